//! With the feature `cuda`: nvcc makes PTX of kernels.cu, which any device of the capability that it is
//! made for, or a later one, can run.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where nvcc may be, the best first.
fn nvcc() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = env::var_os("NVCC").map(PathBuf::from).into_iter().collect();
    for variable in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"] {
        if let Some(home) = env::var_os(variable) {
            found.push(Path::new(&home).join("bin").join("nvcc"));
        }
        println!("cargo::rerun-if-env-changed={variable}");
    }
    found.push("nvcc".into());
    found.push("/usr/local/cuda/bin/nvcc".into());
    found
}

fn main() {
    const SOURCE: &str = "src/exec/cuda/kernels.cu";
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=src/exec/cuda/build.rs");
    println!("cargo::rerun-if-env-changed=NVCC");
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    // Nothing newer than Turing's is used; an older device has to be named, as for candle.
    let named = env::var("CUDA_COMPUTE_CAP").ok();
    let capability = named.and_then(|cap| cap.parse().ok()).unwrap_or(75).min(75);
    let out = env::var_os("OUT_DIR")
        .map(PathBuf::from)
        .unwrap_or_default();
    for nvcc in nvcc() {
        let done = Command::new(&nvcc)
            .args([
                "-ptx",
                "-O3",
                &format!("-arch=compute_{capability}"),
                SOURCE,
                "-o",
            ])
            .arg(out.join("kernels.ptx"))
            .output();
        match done {
            Ok(done) if done.status.success() => return,
            Ok(done) => {
                let said = String::from_utf8_lossy(&done.stderr);
                panic!("{}: {said}", nvcc.display());
            }
            // The next one, perhaps.
            Err(_) => (),
        }
    }
    panic!("the feature cuda needs nvcc, of the CUDA toolkit (on the PATH, or below CUDA_HOME)");
}
