//! The way from a picture's bytes to logits, against Pillow and torchvision
//! (tests/oracle/photos.py).

mod common;

use std::path::PathBuf;

use common::{f32_tensor, golden, photo, repository};
use image::{DynamicImage, GrayAlphaImage, GrayImage, ImageFormat, RgbImage, RgbaImage};
use rand::{RngExt, SeedableRng};
use sconce::data::{Decoder, Rgb, crop_pixels, crop_view, prepare};
use sconce::exec::cpu::Options;
use sconce::models::{Interpolation, Preprocessing};
use sconce::weights::{Request, WeightsChoice, resolve};

const DECODER: Decoder = Decoder {
    max_pixels: 100_000_000,
    background: None,
    exact: false,
};

#[derive(serde::Deserialize)]
struct Crop {
    name: String,
    height: usize,
    width: usize,
    channels: usize,
    resize: usize,
    crop: usize,
    interpolation: Interpolation,
    hash: String,
    first: Vec<u8>,
}

/// A formula's picture as a PNG file.
fn png(crop: &Crop) -> Vec<u8> {
    let pixels = photo(&crop.name, crop.height, crop.width, crop.channels);
    let (w, h) = (crop.width as u32, crop.height as u32);
    let image: DynamicImage = match crop.channels {
        1 => GrayImage::from_raw(w, h, pixels).unwrap().into(),
        2 => GrayAlphaImage::from_raw(w, h, pixels).unwrap().into(),
        3 => RgbImage::from_raw(w, h, pixels).unwrap().into(),
        _ => RgbaImage::from_raw(w, h, pixels).unwrap().into(),
    };
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// FNV-1a, in hexadecimal.
fn hashed(bytes: &[u8]) -> String {
    let step = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", bytes.iter().fold(0xcbf2_9ce4_8422_2325, step))
}

#[test]
fn preprocessed_png_files_equal_torchvisions_bit_for_bit() {
    let crops: Vec<Crop> = serde_json::from_slice(&golden("crops.json")).unwrap();
    assert!(crops.len() > 40);
    for crop in &crops {
        let image = DECODER.decode(&png(crop)).unwrap();
        let preprocessing = Preprocessing {
            interpolation: crop.interpolation,
            ..Preprocessing::torchvision(crop.resize, crop.crop)
        };
        let pixels = crop_pixels(&image, &preprocessing);
        let what = format!(
            "{} x {} x {}, {:?} to {}",
            crop.height, crop.width, crop.channels, crop.interpolation, crop.resize
        );
        assert_eq!(pixels[..crop.first.len()], crop.first, "{what}");
        assert_eq!(hashed(&pixels), crop.hash, "{what}");
    }
}

/// Largest difference of a pixel that a decoder may make. JPEGs are read as libjpeg reads them, but for
/// those with ink, which is turned into RGB in another order of roundings.
fn tolerance(name: &str) -> u8 {
    match name {
        "cmyk.jpg" => 2,
        "cmyk.tiff" => 1,
        _ => 0,
    }
}

#[test]
fn every_kind_of_file_is_read_as_pillow_reads_it() {
    let bytes = golden("images.safetensors");
    let goldens = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut failures = Vec::new();
    for (name, expected) in goldens.tensors() {
        let file = std::fs::read(repository("tests/images").join(&name)).unwrap();
        let image = match DECODER.decode(&file) {
            Ok(image) => image,
            Err(error) => {
                failures.push(format!("{name}: {error}"));
                continue;
            }
        };
        assert_eq!(expected.shape(), [image.height, image.width, 3], "{name}");
        let differences = image.pixels.iter().zip(expected.data());
        let largest = differences.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        println!("{name}: {largest}");
        if largest > tolerance(&name) {
            failures.push(format!("{name}: differs by {largest}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[derive(serde::Deserialize)]
struct Jpeg {
    name: String,
    jpeg: String,
    hash: String,
}

#[test]
fn jpegs_of_many_shapes_are_read_bit_for_bit_as_libjpeg_reads_them() {
    use base64::Engine;
    let jpegs: Vec<Jpeg> = serde_json::from_slice(&golden("jpegs.json")).unwrap();
    assert!(jpegs.len() > 200);
    for Jpeg { name, jpeg, hash } in jpegs {
        let bytes = base64::prelude::BASE64_STANDARD.decode(jpeg).unwrap();
        let image = DECODER.decode(&bytes).unwrap();
        assert_eq!(hashed(&image.pixels), hash, "{name}");
    }
}

/// A JPEG with an EXIF segment that says how it is to be turned.
fn oriented(jpeg: &[u8], orientation: u8) -> Vec<u8> {
    let mut exif =
        b"\xff\xe1\0\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
    [&jpeg[..2], &exif, &jpeg[2..]].concat()
}

#[test]
fn what_is_read_for_a_crop_is_enough_for_it() {
    use base64::Engine;
    let exact = Decoder {
        exact: true,
        ..DECODER
    };
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let jpegs: Vec<Jpeg> = serde_json::from_slice(&golden("jpegs.json")).unwrap();
    let (mut parts, mut smaller) = (0, 0);
    for Jpeg { name, jpeg, .. } in jpegs {
        let bytes = base64::prelude::BASE64_STANDARD.decode(jpeg).unwrap();
        for orientation in 1..=8 {
            let bytes = oriented(&bytes, orientation);
            let whole = exact.decode(&bytes).unwrap();
            let resize = rng.random_range(1..=2 * whole.width.min(whole.height));
            let preprocessing = Preprocessing {
                interpolation: if rng.random() {
                    Interpolation::Bilinear
                } else {
                    Interpolation::Bicubic
                },
                squash: rng.random_bool(0.2),
                ..Preprocessing::torchvision(resize, rng.random_range(1..=resize))
            };
            let view = exact.decode_for(&preprocessing, &bytes).unwrap();
            let what = format!("{name} turned {orientation}, {preprocessing:?}");
            assert_eq!(
                [view.width, view.height],
                [whole.width, whole.height],
                "{what}"
            );
            assert!(
                crop_view(&view, &preprocessing) == crop_pixels(&whole, &preprocessing),
                "{what}"
            );
            parts += usize::from(view.image.pixels.len() < whole.pixels.len());
            // Of what is read smaller, a window is what all of it has there.
            let preprocessing = Preprocessing {
                resize: whole.width.min(whole.height).div_ceil(7),
                ..preprocessing
            };
            let all = Preprocessing {
                crop: preprocessing.resize,
                squash: true,
                ..preprocessing
            };
            let part = Preprocessing {
                crop: preprocessing.resize.div_ceil(3),
                ..all
            };
            let [all, part] = [all, part].map(|p| DECODER.decode_for(&p, &bytes).unwrap());
            assert_eq!(all.by, part.by, "{what}");
            let [left, top] = [0, 1].map(|axis| part.origin[axis] - all.origin[axis]);
            for (y, row) in part.image.pixels.chunks(part.image.width * 3).enumerate() {
                let start = ((top + y) * all.image.width + left) * 3;
                assert!(row == &all.image.pixels[start..][..row.len()], "{what}");
            }
            smaller += usize::from(part.by > 1);
        }
    }
    println!("{parts} parts, {smaller} smaller");
    assert!(parts > 1000 && smaller > 100);
}

/// Settings for which all of a picture of that size is read at one part in `by` of it.
fn reduced_by(by: usize, [width, height]: [usize; 2]) -> Preprocessing {
    let short = 2 * width.min(height) / (5 * by);
    Preprocessing {
        squash: true,
        ..Preprocessing::torchvision(short, short)
    }
}

#[test]
fn jpegs_read_at_a_part_of_their_size_are_the_means_of_their_pixels() {
    let bytes = golden("images.safetensors");
    let goldens = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut count = 0;
    for (name, whole) in goldens.tensors() {
        let [height, width, _] = *whole.shape() else {
            panic!("{name}");
        };
        let file = std::fs::read(repository("tests/images").join(&name)).unwrap();
        // Of these another decoder sees all.
        let plain = !file.starts_with(&[0xff, 0xd8]) || name == "cmyk.jpg";
        for by in [2, 4, 8] {
            let preprocessing = reduced_by(by, [width, height]);
            let picture = DECODER.decode_for(&preprocessing, &file).unwrap();
            assert_eq!([picture.width, picture.height], [width, height], "{name}");
            if plain || preprocessing.resize == 0 {
                assert_eq!(picture.by, 1, "{name}");
                continue;
            }
            count += 1;
            assert_eq!(picture.by, by, "{name}");
            let image = &picture.image;
            assert_eq!(image.width, width.div_ceil(by), "{name}");
            assert_eq!(image.height, height.div_ceil(by), "{name}");
            let pixel = |x: usize, y: usize, c: usize| {
                let at = (y.min(height - 1) * width + x.min(width - 1)) * 3 + c;
                f64::from(whole.data()[at])
            };
            let mut sum = 0.0;
            for (at, &value) in image.pixels.iter().enumerate() {
                let (c, x) = (at % 3, at / 3 % image.width * by);
                let y = at / 3 / image.width * by;
                let cell = (0..by * by).map(|i| pixel(x + i % by, y + i / by, c));
                let mean = cell.sum::<f64>() / (by * by) as f64;
                let difference = (f64::from(value) - mean).abs();
                assert!(
                    difference < 24.0,
                    "{name} / {by}: {x} {y} {c}: {value}, {mean}"
                );
                sum += difference;
            }
            let mean = sum / image.pixels.len() as f64;
            println!("{name} / {by}: {mean:.2}");
            // Pillow smooths chroma as it makes it larger, and this picture's is wild.
            let most = if name.starts_with("42") { 5.0 } else { 2.0 };
            assert!(mean < most, "{name} / {by}: {mean}");
        }
        let exact = Decoder {
            exact: true,
            ..DECODER
        };
        let picture = exact.decode_for(&reduced_by(8, [width, height]), &file);
        assert_eq!(picture.unwrap().by, 1, "{name}");
    }
    assert!(count > 30, "{count}");
}

/// The crops of many files beside Pillow's: `benches/images.py compare` makes them.
#[test]
#[ignore = "needs a folder of crops in SCONCE_CROPS"]
fn crops_of_a_folder_are_near_pillows() {
    let folder = PathBuf::from(std::env::var("SCONCE_CROPS").unwrap());
    let paths = std::fs::read_to_string(folder.join("paths")).unwrap();
    let crops = std::fs::read(folder.join("crops")).unwrap();
    let preprocessing = Preprocessing::torchvision(256, 224);
    for (exact, most) in [(false, 0.02), (true, 0.005)] {
        let decoder = Decoder { exact, ..DECODER };
        let (mut sum, mut worst) = (0.0, 0.0_f64);
        for (path, crop) in paths.lines().zip(crops.chunks(224 * 224 * 3)) {
            let file = std::fs::read(path).unwrap();
            let picture = decoder.decode_for(&preprocessing, &file).unwrap();
            let pixels = crop_view(&picture, &preprocessing);
            let std = preprocessing.std.map(|s| f64::from(s) * 255.0);
            let differences = pixels.iter().zip(crop).enumerate();
            let total: f64 = differences
                .map(|(i, (a, b))| f64::from(a.abs_diff(*b)) / std[i % 3])
                .sum();
            let mean = total / crop.len() as f64;
            sum += mean;
            worst = worst.max(mean);
        }
        let mean = sum / paths.lines().count() as f64;
        println!("exact {exact}: mean difference {mean:.4}, of one picture at most {worst:.4}");
        assert!(mean <= most, "{mean}");
    }
}

/// JPEGs cut off at every byte are refused; with a bit of any byte turned over, they are read or refused.
#[test]
fn broken_jpegs_do_no_harm() {
    let mut read = 0;
    for name in [
        "420.jpg",
        "grey.jpg",
        "progressive.jpg",
        "restart.jpg",
        "odd-420.jpg",
        "orientation-6.jpg",
    ] {
        let file = std::fs::read(repository("tests/images").join(name)).unwrap();
        let whole = DECODER.decode(&file).unwrap();
        let preprocessing = reduced_by(4, [whole.width, whole.height]);
        for length in 0..file.len() {
            let cut = &file[..length];
            assert!(DECODER.decode(cut).is_err(), "{name}: {length}");
            let result = DECODER.decode_for(&preprocessing, cut);
            assert!(result.is_err(), "{name}: {length}");
        }
        for at in 0..file.len() {
            let mut broken = file.clone();
            broken[at] ^= 1 << (at % 8);
            if let Ok(picture) = DECODER.decode_for(&preprocessing, &broken) {
                let (width, height) = DECODER.dimensions(&broken).unwrap();
                let size = [picture.width, picture.height];
                assert!([[width, height], [height, width]].contains(&size.map(|s| s as u32)));
                read += 1;
            }
        }
    }
    assert!(read > 100, "{read}");
}

#[test]
fn a_background_shows_through_transparent_pixels() {
    let mut image = RgbaImage::new(2, 1);
    image.put_pixel(0, 0, image::Rgba([10, 20, 30, 0]));
    image.put_pixel(1, 0, image::Rgba([10, 20, 30, 255]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).unwrap();
    let decode = |background| {
        let decoder = Decoder {
            background,
            ..DECODER
        };
        decoder.decode(bytes.get_ref()).unwrap().pixels
    };
    assert_eq!(decode(None), [10, 20, 30, 10, 20, 30]);
    assert_eq!(decode(Some([255; 3])), [255, 255, 255, 10, 20, 30]);
}

/// Logits of a photo of assets/, from this network with these weights.
fn logits(name: &str, network: &str, weights: WeightsChoice) -> Vec<f32> {
    let request = Request {
        model: network.into(),
        weights,
        labels: None,
        seed: 0,
        hub: sconce::hub::Hub::new().offline(),
    };
    let model = resolve(&request).unwrap();
    let bytes = std::fs::read(repository("assets").join(name)).unwrap();
    let image: Rgb = DECODER.decode(&bytes).unwrap();
    let pixels = prepare(&image, &model.preprocessing);
    let mut runner = model
        .runner(&candle_core::Device::Cpu, [224; 2], Options::threads(2))
        .unwrap();
    runner.run(&pixels, 1).unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

const PHOTOS: [&str; 3] = ["cat.png", "coffee.png", "photographer.png"];

#[test]
#[cfg(feature = "embedded")]
fn photos_give_torchvisions_logits() {
    let bytes = golden("photos.safetensors");
    let goldens = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for name in PHOTOS {
        let logits = logits(name, "mobilenet_v2", WeightsChoice::Published);
        // The same weights: only the order of sums differs.
        let (_, expected) = f32_tensor(&goldens, &format!("embedded/{name}"));
        let same = largest_difference(&logits, &expected);
        // The published weights, before they were rounded.
        let (_, expected) = f32_tensor(&goldens, &format!("published/{name}"));
        let rounded = largest_difference(&logits, &expected);
        println!("{name}: {same:e} with the same weights, {rounded:e} with the published ones");
        assert!(same <= 1e-3, "{name}: {same}");
        assert!(rounded <= 0.05, "{name}: {rounded}");
    }
}

/// With published float32 weights, which are too large for the repository. SCONCE_TEST_WEIGHTS
/// names a folder that holds them: torchvision's and EfficientNet-Lite0's as published, and
/// tf_mobilenet_v1_100.safetensors as weights/convert.py makes it.
#[test]
#[ignore = "needs published weights"]
fn photos_give_the_references_logits_with_published_weights() {
    let folder = std::env::var_os("SCONCE_TEST_WEIGHTS").expect("SCONCE_TEST_WEIGHTS is a folder");
    let bytes = golden("photos.safetensors");
    let goldens = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (network, golden, file) in [
        ("mobilenet_v2", "published", "mobilenet_v2-b0353104.pth"),
        (
            "efficientnet_lite0",
            "efficientnet_lite0",
            "efficientnet-lite0-57934424.pth",
        ),
        (
            "tf_mobilenet_v1_100",
            "tf_mobilenet_v1_100",
            "tf_mobilenet_v1_100.safetensors",
        ),
    ] {
        let path = PathBuf::from(&folder).join(file);
        for name in PHOTOS {
            let logits = logits(name, network, WeightsChoice::File(path.clone()));
            let (_, expected) = f32_tensor(&goldens, &format!("{golden}/{name}"));
            let difference = largest_difference(&logits, &expected);
            println!("{network}, {name}: {difference:e}");
            assert!(difference <= 1e-3, "{network}, {name}: {difference}");
        }
    }
}

#[test]
fn kinds_that_are_not_read_are_named() {
    let file = std::fs::read(repository("tests/images/odd-420.jpg")).unwrap();
    let frame = file.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    let changed = |at: usize, value: u8| {
        let mut bytes = file.clone();
        bytes[frame + at] = value;
        bytes
    };
    let container = |brand: &[u8]| [b"\0\0\0\x20ftyp".as_slice(), brand, &[0; 20]].concat();
    for (bytes, expected) in [
        (changed(4, 12), "12-bit JPEG images are not read"),
        (
            changed(1, 0xc9),
            "arithmetic-coded JPEG images are not read",
        ),
        (changed(1, 0xc3), "lossless JPEG images are not read"),
        (container(b"avif"), "AVIF images are not read"),
        (container(b"heic"), "HEIC images are not read"),
        (vec![0xff, 0x0a, 1, 2, 3], "JPEG XL images are not read"),
        (
            b"<svg></svg>".to_vec(),
            "not an image in a format that is read",
        ),
    ] {
        let error = DECODER.decode(&bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
