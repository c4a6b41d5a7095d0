//! The kernels on the CPU, for the tests: `kernels.cu` compiled as C++, block after block.

use std::ffi::{CString, c_void};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};

use super::launch::{Args, Work};

type Kernel = *const c_void;
type Launch = unsafe extern "C" fn(Kernel, *const Args, u32, u32, i32);

/// What the compiler made. Only one launch at a time: the emulation has one set of threads.
struct Library {
    handle: usize,
    launch: Launch,
    busy: Mutex<()>,
}

fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (source, object) = (folder.path().join("k.cpp"), folder.path().join("k.so"));
        let parts = [
            include_str!("emulation.h"),
            include_str!("kernels.cu"),
            "EMULATED_LAUNCH",
        ];
        std::fs::write(&source, parts.join("\n")).unwrap();
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let done = Command::new(&compiler)
            .args(["-std=c++17", "-O2", "-shared", "-fPIC", "-o"])
            .arg(&object)
            .arg(&source)
            .output()
            .unwrap_or_else(|e| panic!("{compiler}: {e} (these tests need a C++ compiler)"));
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        let path = CString::new(object.to_str().unwrap()).unwrap();
        // SAFETY: the library is the one just made, which runs nothing when it is loaded.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null());
        let launch = symbol(handle as usize, "launch");
        Library {
            handle: handle as usize,
            // SAFETY: what emulation.h declares.
            launch: unsafe { std::mem::transmute::<Kernel, Launch>(launch) },
            busy: Mutex::new(()),
        }
    })
}

fn symbol(handle: usize, name: &str) -> Kernel {
    let name_c = CString::new(name).unwrap();
    // SAFETY: the library stays loaded.
    let found = unsafe { libc::dlsym(handle as *mut c_void, name_c.as_ptr()) };
    assert!(!found.is_null(), "there is no kernel {name}");
    found
}

pub fn launch(name: &str, work: Work, tensors: &[Option<&Tensor>], mut args: Args) -> Result<()> {
    let library = library();
    let kernel = symbol(library.handle, name);
    let storages: Vec<_> = tensors
        .iter()
        .map(|tensor| tensor.map(Tensor::storage_and_layout))
        .collect();
    for (slot, storage) in args.p.iter_mut().zip(&storages) {
        if let Some((storage, layout)) = storage {
            let Storage::Cpu(storage) = &**storage else {
                bail!("{name}: a tensor is on another device");
            };
            let offset = layout.start_offset();
            *slot = match storage {
                CpuStorage::F32(v) => v[offset..].as_ptr() as u64,
                CpuStorage::F16(v) => v[offset..].as_ptr() as u64,
                CpuStorage::BF16(v) => v[offset..].as_ptr() as u64,
                CpuStorage::U8(v) => v[offset..].as_ptr() as u64,
                _ => bail!("{name}: no such values"),
            };
        }
    }
    let (blocks, threads) = work.grid();
    let exchanges = matches!(work, Work::Rows(_));
    let _one = library.busy.lock().unwrap_or_else(|e| e.into_inner());
    // SAFETY: as on a device; an output is a tensor that was just made, which nothing else reads.
    unsafe { (library.launch)(kernel, &args, blocks, threads, exchanges.into()) };
    Ok(())
}
