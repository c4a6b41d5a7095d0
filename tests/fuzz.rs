//! Readers of files that strangers write, on mutated files: no panic, and no more memory than a
//! small multiple of the file.
//!
//! The plain test runs some thousands of mutations from a fixed seed, and every file of
//! tests/golden/fuzz, which holds what has failed before. For longer:
//! `SCONCE_FUZZ_SECONDS=600 cargo test --release --test fuzz -- --ignored --nocapture`.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sconce::data::{Decoder, crop_view};
use sconce::exec::params::{TensorMap, TensorSource};
use sconce::models::{Preprocessing, registry};
use sconce::weights::{Checkpoint, Description, Head, closest, configuration, fit};

/// Counts what is allocated.
struct Counting;

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = CURRENT.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CURRENT.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One reader at a time: allocations are counted for the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// Bytes of memory for each byte of the file, and some for any file: a pickle may make an object
/// of every byte, and the smallest may make some ten thousand.
const MEMORY_PER_BYTE: usize = 64;
const MEMORY: usize = 8 << 20;

/// Of a picture of a million pixels: four channels of 16 bits and what decoders may take beside, for
/// each of two buffers, and what it is converted to; or the 256 MiB that the TIFF decoder may reserve
/// (and not touch) for the values of a tag before the picture's size is known.
const PICTURE_MEMORY: usize = 264 << 20;

type Reader = fn(&[u8]);

/// A weights file of any format: header, and every tensor.
fn weights(bytes: &[u8]) {
    let Ok(file) = Checkpoint::from_bytes(bytes.to_vec()) else {
        return;
    };
    let _ = file.description().map(Description::parse);
    for name in file.names() {
        let elements = file.shape(&name).unwrap().iter().product::<usize>();
        if let Ok(values) = file.read(&name) {
            assert_eq!(values.len(), elements);
        }
    }
}

/// Names and shapes, a line each, against the tables of every family.
fn names(bytes: &[u8]) {
    struct Names(HashMap<String, Vec<usize>>);
    impl TensorSource for Names {
        fn names(&self) -> Vec<String> {
            self.0.keys().cloned().collect()
        }
        fn shape(&self, name: &str) -> Option<Vec<usize>> {
            self.0.get(name).cloned()
        }
        fn read(&self, _: &str) -> candle_core::Result<Vec<f32>> {
            Ok(Vec::new())
        }
    }
    let text = String::from_utf8_lossy(bytes);
    let parse = |line: &str| {
        let (name, shape) = line.rsplit_once(' ')?;
        let shape = shape.split('x').map(|d| d.parse().unwrap_or(usize::MAX));
        Some((name.to_string(), shape.collect()))
    };
    let names = std::sync::Arc::new(Names(text.lines().filter_map(parse).collect()));
    let _ = closest(&*names);
    for network in ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100"] {
        let architecture = registry::find(network).unwrap().row.architecture;
        for head in [
            Head::FromFile,
            Head::Classes {
                count: 3,
                reset: false,
            },
        ] {
            if let Ok(fitted) = fit(names.clone(), &architecture, head) {
                let source = &fitted.source;
                assert!(
                    fitted
                        .report
                        .loaded
                        .iter()
                        .all(|n| source.shape(n).is_some())
                );
            }
        }
    }
}

/// Pictures of every format, whole and as a network needs them.
fn pictures(bytes: &[u8]) {
    let decoder = Decoder {
        max_pixels: 1 << 20,
        background: None,
        exact: false,
    };
    let whole = decoder.decode(bytes);
    if let Ok(image) = &whole {
        assert_eq!(image.pixels.len(), image.width * image.height * 3);
    }
    for short in [4, 8, 16] {
        let preprocessing = Preprocessing::torchvision(short, short);
        match decoder.decode_for(&preprocessing, bytes) {
            Ok(picture) => {
                let pixels = crop_view(&picture, &preprocessing);
                assert_eq!(pixels.len(), short * short * 3);
            }
            Err(_) => assert!(whole.is_err()),
        }
    }
}

/// A config.json, alone or with what comes after a NUL as the preprocessor's; a description.
fn configurations(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |&b| b == 0);
    let config = parts.next().unwrap_or_default();
    if let Ok(found) = configuration(config, parts.next()) {
        found.architecture.check().unwrap();
        found.preprocessing.check().unwrap();
    }
    if let Ok(text) = std::str::from_utf8(config)
        && let Ok(description) = Description::parse(text)
    {
        description.architecture.check().unwrap();
    }
}

fn golden(name: &str) -> Vec<u8> {
    common::golden(&format!("checkpoints/{name}"))
}

/// Readers with files to begin from.
fn readers() -> Vec<(&'static str, Reader, Vec<Vec<u8>>)> {
    let cases: Vec<serde_json::Value> = serde_json::from_slice(&golden("names.json")).unwrap();
    let lists = cases.iter().map(|case| {
        let lines = case["tensors"].as_array().unwrap().iter();
        let lines: Vec<&str> = lines.map(|l| l.as_str().unwrap()).collect();
        lines.join("\n").into_bytes()
    });
    let description = br#"{"format_version":1,"name":"n","architecture":{"family":"resnet",
        "block":"basic","layers":[2,2,2,2],"groups":1,"width_per_group":64},"labels":["a","b"],
        "preprocessing":{"resize":256,"crop":224,"interpolation":"bilinear",
        "mean":[0.5,0.5,0.5],"std":[0.5,0.5,0.5]},"temperature":1.5}"#;
    let mut configurations_seen = vec![description.to_vec()];
    configurations_seen.extend(CONFIGURATIONS.iter().map(|text| text.as_bytes().to_vec()));
    vec![
        (
            "safetensors",
            weights,
            vec![
                golden("plain.safetensors"),
                golden("part-1-of-2.safetensors"),
            ],
        ),
        (
            "stream",
            weights,
            ["stream.pth", "nested-stream.pt", "protocol5-stream.pth"]
                .map(golden)
                .to_vec(),
        ),
        (
            "zip",
            weights,
            ["zip.pth", "nested.pt", "protocol4.pth", "quantized.pth"]
                .map(golden)
                .to_vec(),
        ),
        ("names", names, lists.collect()),
        ("config", configurations, configurations_seen),
        ("pictures", pictures, seeds_of_pictures()),
    ]
}

/// A file of every format, in the order of their names.
fn seeds_of_pictures() -> Vec<Vec<u8>> {
    let folder = std::fs::read_dir(common::repository("tests/images")).unwrap();
    let mut paths: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

const CONFIGURATIONS: [&str; 5] = [
    r#"{"architecture":"resnet50","num_classes":2,"label_names":["a","b"],"label_descriptions":
    {"a":"x"},"pretrained_cfg":{"input_size":[3,224,224],"interpolation":"bicubic","crop_pct":0.95,
    "crop_mode":"center","mean":[0.5,0.5,0.5],"std":[0.2,0.2,0.2]}}"#,
    "{\"model_type\":\"vit\",\"hidden_size\":64,\"num_hidden_layers\":2,\"num_attention_heads\":2,
    \"intermediate_size\":128,\"patch_size\":16,\"image_size\":32,\"layer_norm_eps\":1e-12,
    \"id2label\":{\"0\":\"a\",\"1\":\"b\"}}\0{\"size\":{\"height\":32,\"width\":32},\"resample\":2,
    \"image_mean\":[0.5,0.5,0.5],\"image_std\":[0.5,0.5,0.5],\"rescale_factor\":0.00392156862745098}",
    "{\"model_type\":\"resnet\",\"depths\":[2,2,2,2],\"hidden_sizes\":[64,128,256,512],
    \"layer_type\":\"basic\"}\0{\"image_processor_type\":\"ConvNextImageProcessor\",\"crop_pct\":0.875,
    \"size\":{\"shortest_edge\":224},\"resample\":3}",
    r#"{"model_type":"mobilenet_v1","depth_multiplier":0.25,"tf_padding":true}"#,
    "{\"model_type\":\"mobilenet_v2\",\"depth_multiplier\":1.4}\0{\"size\":{\"shortest_edge\":256},
    \"crop_size\":{\"height\":224,\"width\":224},\"do_center_crop\":true}",
];

/// Values that lie at the edges of what formats hold.
const EDGES: [u64; 10] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 40,
    u64::MAX >> 1,
    u64::MAX - 7,
    u64::MAX,
];

fn mutate(bytes: &mut Vec<u8>, others: &[Vec<u8>], rng: &mut ChaCha8Rng) {
    for _ in 0..rng.random_range(1..6) {
        if bytes.is_empty() {
            bytes.push(rng.random_range(0..=255));
        }
        let at = rng.random_range(0..bytes.len());
        let most = (bytes.len() - at).min(40);
        let length = rng.random_range(0..=most);
        match rng.random_range(0..9) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random_range(0..=255),
            2 => drop(bytes.drain(at..at + length)),
            3 => bytes.truncate(at),
            4 => {
                // A part again, up to many times.
                let part = bytes[at..at + length].to_vec();
                let times = 1 << rng.random_range(0..6);
                let repeated = part.repeat(times);
                bytes.splice(at..at, repeated);
            }
            5 => {
                let edge = EDGES[rng.random_range(0..EDGES.len())].to_le_bytes();
                let width = [1, 2, 4, 8][rng.random_range(0..4)].min(most);
                bytes[at..at + width].copy_from_slice(&edge[..width]);
            }
            6 => {
                // A number in text.
                let edge = EDGES[rng.random_range(0..EDGES.len())].to_string();
                if let Some(digit) = bytes[at..].iter().position(u8::is_ascii_digit) {
                    bytes.splice(at + digit..=at + digit, edge.bytes());
                }
            }
            7 => {
                let other = &others[rng.random_range(0..others.len())];
                if !other.is_empty() {
                    let from = rng.random_range(0..other.len());
                    let to = (from + 64).min(other.len());
                    bytes.splice(at..at, other[from..to].iter().copied());
                }
            }
            _ => {
                let to = rng.random_range(0..bytes.len());
                bytes.swap(at, to);
            }
        }
    }
    bytes.truncate(1 << 20);
}

/// Runs a reader; what went wrong, in words.
fn run(name: &str, reader: Reader, bytes: &[u8]) -> Result<(), String> {
    let before = CURRENT.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let result = catch_unwind(AssertUnwindSafe(|| reader(bytes)));
    let used = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    if result.is_err() {
        return Err("panicked".into());
    }
    // A picture's size is what its header says, within the limit.
    let decoded = if name == "pictures" {
        PICTURE_MEMORY
    } else {
        0
    };
    let allowed = MEMORY + decoded + MEMORY_PER_BYTE * bytes.len();
    if used > allowed {
        return Err(format!("took {used} bytes for a file of {}", bytes.len()));
    }
    Ok(())
}

/// What is made once for all files does not count against one.
fn warm_up() {
    let _ = closest(&TensorMap::default());
}

fn fuzz(name: &str, reader: Reader, seeds: &[Vec<u8>], enough: impl Fn(u64) -> bool) -> u64 {
    let first: u64 = std::env::var("SCONCE_FUZZ_SEED").map_or(0, |s| s.parse().unwrap());
    let mut count = 0;
    while !enough(count) {
        let mut rng = ChaCha8Rng::seed_from_u64(first + count);
        let mut bytes = seeds[rng.random_range(0..seeds.len())].clone();
        mutate(&mut bytes, seeds, &mut rng);
        if let Err(problem) = run(name, reader, &bytes) {
            let file = std::env::temp_dir().join(format!("fuzz-{name}-{}", first + count));
            std::fs::write(&file, &bytes).unwrap();
            panic!(
                "{name} {problem}: see {}, and keep it in tests/golden/fuzz",
                file.display()
            );
        }
        count += 1;
    }
    count
}

#[test]
fn some_thousands_of_broken_files_do_no_harm() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    warm_up();
    for (name, reader, seeds) in readers() {
        for seed in &seeds {
            run(name, reader, seed).unwrap_or_else(|problem| panic!("{name}: {problem}"));
        }
        let most = if name == "names" { 400 } else { 3000 };
        fuzz(name, reader, &seeds, |count| count == most);
    }
}

#[test]
fn what_failed_before_does_no_harm() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    warm_up();
    for entry in std::fs::read_dir(common::repository("tests/golden/fuzz")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        for (name, reader, _) in readers() {
            let result = run(name, reader, &bytes);
            result.unwrap_or_else(|problem| panic!("{}: {problem}", path.display()));
        }
    }
}

#[test]
#[ignore = "runs for SCONCE_FUZZ_SECONDS for each reader"]
fn for_longer() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    warm_up();
    let seconds = std::env::var("SCONCE_FUZZ_SECONDS").map_or(10, |s| s.parse().unwrap());
    let only = std::env::var("SCONCE_FUZZ_ONLY").unwrap_or_default();
    for (name, reader, seeds) in readers() {
        if !only.is_empty() && only != name {
            continue;
        }
        let end = Instant::now() + Duration::from_secs(seconds);
        let count = fuzz(name, reader, &seeds, |_| Instant::now() > end);
        println!("{name}: {count} files in {seconds} s");
    }
}
