//! Data in every form, and folders as people have them, through the binary.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::photo;
use serde_json::Value;
use tempfile::TempDir;

/// A small picture that no other name gives.
fn picture(name: &str, side: u32) -> image::RgbImage {
    let pixels = photo(name, side as usize, side as usize, 3);
    image::RgbImage::from_raw(side, side, pixels).unwrap()
}

fn save(root: &Path, name: &str) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    picture(name, 40).save(path).unwrap();
}

/// A folder with these pictures.
fn folder(names: &[&str]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    names.iter().for_each(|name| save(root.path(), name));
    root
}

/// Some pictures of each class.
fn classes(classes: &[&str], count: usize) -> TempDir {
    let names = classes
        .iter()
        .flat_map(|class| (0..count).map(move |i| format!("{class}/{i}.png")));
    folder(
        &names
            .collect::<Vec<_>>()
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>(),
    )
}

/// Trains a head for two epochs, which takes a moment.
fn finetune(data: &str, more: &[&str]) -> (Output, TempDir) {
    let out = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_sconce"))
        .env("HF_HUB_OFFLINE", "1")
        .args(["finetune", data, "--force", "--format", "json"])
        .args("--freeze backbone --image-size 32 --epochs 2 -b 4".split(' '))
        .args(more)
        .arg("-o")
        .arg(out.path())
        .output()
        .unwrap();
    (output, out)
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The summary of a run that ends with that exit code, and what was said.
fn summary(data: &str, code: i32) -> (Value, String) {
    let (output, _) = finetune(data, &[]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    (serde_json::from_slice(&output.stdout).unwrap(), said)
}

fn text(root: &TempDir) -> &str {
    root.path().to_str().unwrap()
}

/// The last line of a run that cannot be done.
fn refused(data: &str) -> String {
    let (output, _) = finetune(data, &[]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    said.lines().last().unwrap_or_default().to_string()
}

#[test]
fn classes_may_have_folders_and_much_else_beside_them() {
    let root = folder(&[
        "rose/1.png",
        "rose/garden/2.png",
        "rose/garden/deep/3.JPG",
        "tulip/1.png",
        "tulip/2.png",
        ".hidden/1.png",
        "rose/.hidden.png",
        "rose/.thumbnails/1.png",
        "loose.png",
    ]);
    fs::write(root.path().join("rose/notes.txt"), "no image").unwrap();
    fs::write(root.path().join("README.md"), "no image").unwrap();
    fs::write(root.path().join("tulip/Thumbs.db"), "no image").unwrap();
    let (summary, said) = summary(text(&root), 0);
    assert_eq!(summary["classes"], 2);
    assert_eq!(summary["train_images"], 3);
    assert_eq!(summary["val_images"], 2);
    assert!(
        said.contains("1 images lie beside the class folders"),
        "{said}"
    );
}

#[test]
#[cfg(unix)]
fn links_are_followed_and_those_that_lead_nowhere_are_named() {
    use std::os::unix::fs::symlink;
    let root = classes(&["rose", "tulip"], 3);
    let elsewhere = folder(&["lily/1.png", "lily/2.png", "one.png"]);
    symlink(elsewhere.path().join("lily"), root.path().join("lily")).unwrap();
    symlink(
        elsewhere.path().join("one.png"),
        root.path().join("rose/one.png"),
    )
    .unwrap();
    symlink(".", root.path().join("rose/loop")).unwrap();
    symlink("gone.png", root.path().join("rose/broken.png")).unwrap();
    let (summary, said) = summary(text(&root), 1);
    assert_eq!(summary["classes"], 3);
    let images =
        summary["train_images"].as_u64().unwrap() + summary["val_images"].as_u64().unwrap();
    assert_eq!(images, 9);
    assert!(said.contains("a link back to"), "{said}");
    assert!(said.contains("broken.png: "), "{said}");
    assert!(said.contains("left out as unreadable: 2"), "{said}");
}

#[test]
fn classes_without_images_are_refused_by_name() {
    let root = classes(&["rose", "tulip"], 2);
    fs::create_dir(root.path().join("lily")).unwrap();
    let error = refused(text(&root));
    assert!(
        error.contains("lily: no images in this folder (put"),
        "{error}"
    );
    fs::write(root.path().join("lily/note.txt"), "no image").unwrap();
    let error = refused(text(&root));
    assert!(
        error.contains("lily: no images in this folder (put"),
        "{error}"
    );
}

#[test]
#[cfg(unix)]
fn a_class_that_may_not_be_read_is_refused_and_a_part_of_one_left_out() {
    use std::os::unix::fs::PermissionsExt;
    let root = classes(&["rose", "tulip"], 3);
    save(root.path(), "rose/locked/1.png");
    let lock = |name: &str, mode: u32| {
        let path = root.path().join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    let locked = lock("rose/locked", 0);
    if fs::read_dir(&locked).is_ok() {
        // Nothing is locked for this user.
        lock("rose/locked", 0o755);
        return;
    }
    let (_, said) = summary(text(&root), 1);
    assert!(said.contains("locked: Permission denied"), "{said}");
    lock("rose/locked", 0o755);
    lock("tulip", 0);
    let error = refused(text(&root));
    lock("tulip", 0o755);
    assert!(error.contains("tulip: Permission denied"), "{error}");
}

#[test]
fn too_few_classes_or_images_have_their_answer() {
    let root = classes(&["rose"], 4);
    let error = refused(text(&root));
    assert!(error.contains("one class only, rose"), "{error}");
    // One image a class: nothing to judge by.
    let root = classes(&["rose", "tulip"], 1);
    let error = refused(text(&root));
    assert!(error.contains("no images left to validate on"), "{error}");
    // Of some classes only.
    save(root.path(), "tulip/2.png");
    let (summary, said) = summary(text(&root), 0);
    assert_eq!(summary["val_images"], 1);
    assert!(said.contains("no images to validate on of rose"), "{said}");
}

#[test]
fn one_image_on_both_sides_is_found_by_its_content() {
    let root = folder(&[
        "train/a/1.png",
        "train/a/2.png",
        "train/b/3.png",
        "val/a/4.png",
        "val/b/5.png",
    ]);
    let (_, said) = summary(text(&root), 0);
    assert!(!said.contains("flatter"), "{said}");
    fs::copy(
        root.path().join("train/a/2.png"),
        root.path().join("val/b/copy.png"),
    )
    .unwrap();
    let (_, said) = summary(text(&root), 0);
    let warned = said.lines().find(|line| line.contains("flatter")).unwrap();
    assert!(
        warned.contains("1 of the 3 images to validate on"),
        "{warned}"
    );
    assert!(
        warned.contains("copy.png is ") && warned.contains("2.png ("),
        "{warned}"
    );
}

#[test]
fn names_that_differ_only_in_case_are_two_classes_and_said() {
    let root = classes(&["cat", "dog"], 2);
    save(root.path(), "Cat/1.png");
    if fs::read_dir(root.path()).unwrap().count() < 3 {
        // A file system for which they are one.
        return;
    }
    save(root.path(), "Cat/2.png");
    let (summary, said) = summary(text(&root), 0);
    assert_eq!(summary["classes"], 3);
    assert!(said.contains("Cat and cat differ only in case"), "{said}");
}

#[test]
#[cfg(target_os = "linux")]
fn names_that_are_no_utf8_are_read_for_images_and_refused_for_classes() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let root = classes(&["rose", "tulip"], 3);
    let odd = root
        .path()
        .join("rose")
        .join(OsStr::from_bytes(b"caf\xe9.png"));
    fs::copy(root.path().join("rose/1.png"), odd).unwrap();
    // A copy of it may be on the other side.
    let (summary, _) = summary(text(&root), 0);
    let images =
        summary["train_images"].as_u64().unwrap() + summary["val_images"].as_u64().unwrap();
    assert_eq!(images, 7);
    fs::create_dir(root.path().join(OsStr::from_bytes(b"caf\xe9"))).unwrap();
    let error = refused(text(&root));
    assert!(error.contains("no valid UTF-8"), "{error}");
}

#[test]
fn cifars_binary_files_are_data() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("cifar-10-batches-bin");
    fs::create_dir(&folder).unwrap();
    let record = |index: usize| {
        let mut record = vec![(index % 10) as u8];
        record.extend(photo(&format!("cifar {index}"), 32, 32, 3));
        record
    };
    for batch in 0..6 {
        let name = match batch {
            5 => "test_batch.bin".to_string(),
            batch => format!("data_batch_{}.bin", batch + 1),
        };
        let records: Vec<u8> = (batch * 10..batch * 10 + 10).flat_map(record).collect();
        fs::write(folder.join(name), records).unwrap();
    }
    let data = format!("cifar10:{}", text(&root));
    let (summary, _) = summary(&data, 0);
    assert_eq!(summary["classes"], 10);
    assert_eq!(
        (&summary["train_images"], &summary["val_images"]),
        (&50.into(), &10.into())
    );
    let broken = folder.join("data_batch_3.bin");
    fs::write(&broken, &record(1)[1..]).unwrap();
    let error = refused(&data);
    assert!(
        error.contains("data_batch_3.bin: 3072 bytes are not"),
        "{error}"
    );
    fs::remove_file(&broken).unwrap();
    let error = refused(&data);
    assert!(error.contains("no data_batch_3.bin here"), "{error}");
    let error = refused("cifar10:nowhere");
    assert!(error.contains("no test_batch.bin here"), "{error}");
}

#[test]
fn every_augmentation_trains_and_the_cache_changes_no_byte() {
    let root = classes(&["rose", "tulip"], 6);
    let model = |more: &[&str]| {
        let (output, out) = finetune(text(&root), more);
        assert!(output.status.success(), "{}", stderr(&output));
        fs::read(out.path().join("model.safetensors")).unwrap()
    };
    let mut models = Vec::new();
    for augment in ["none", "light", "trivial", "rand"] {
        let augmented = ["--augment", augment, "--color-jitter", "0.2"];
        let of = |size: &str| model(&[&augmented, &["--cache-memory", size][..]].concat());
        let whole = of("1G");
        // A picture decoded is 4.8 kB, a crop 3 kB: a few fit.
        assert!(whole == of("0") && whole == of("12k"), "{augment}");
        models.push(whole);
    }
    for (index, one) in models.iter().enumerate() {
        assert!(!models[..index].contains(one), "two augmentations are one");
    }
    let (output, _) = finetune(text(&root), &["--cache-memory", "much"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("500M or 2G"),
        "{}",
        stderr(&output)
    );
}

/// Fifty thousand images in a thousand classes; half a minute, mostly to make them.
#[test]
#[ignore = "writes 50,000 files"]
#[cfg(unix)]
fn fifty_thousand_images_are_found_in_seconds() {
    let root = tempfile::tempdir().unwrap();
    for class in 0..1000 {
        let folder = root.path().join(format!("class {class:04}"));
        fs::create_dir(&folder).unwrap();
        for index in 0..50 {
            // All of one length, so that every one of them is compared.
            let mut bytes = vec![0; 2000];
            bytes[..8].copy_from_slice(&(class * 50u64 + index).to_le_bytes());
            bytes[996..1004].copy_from_slice(&(class * 50u64 + index).to_le_bytes());
            fs::write(folder.join(format!("{index}.jpg")), bytes).unwrap();
        }
    }
    let began = std::time::Instant::now();
    // None can be read, which ends the run as soon as all are found and looked at once.
    let error = refused(text(&root));
    println!("{:.1} s: {error}", began.elapsed().as_secs_f64());
    assert!(error.contains("could be read"), "{error}");
    assert!(began.elapsed().as_secs_f64() < 20.0);
}
