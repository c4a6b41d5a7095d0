//! Augmentation against torchvision on Pillow images (tests/oracle/augmentation.py).

mod common;

use std::collections::HashMap;

use common::{golden, photo, uniform};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sconce::data::{
    Mix, Operation, Rgb, color_jitter, erased_part, rand_augment, random_part, trivial_augment,
};
use sconce::train::mixed_targets;

#[derive(serde::Deserialize)]
struct Golden {
    pictures: Vec<Picture>,
    cube: Vec<Cube>,
    trivial: HashMap<String, Vec<f64>>,
    rand: Vec<Space>,
    mixup: Mixed,
    cutmix: Mixed,
    distributions: Vec<Distribution>,
}

#[derive(serde::Deserialize)]
struct Picture {
    kind: String,
    height: usize,
    width: usize,
    /// Operation, magnitude, checksum.
    results: Vec<(String, f64, String)>,
}

#[derive(serde::Deserialize)]
struct Cube {
    hue: f64,
    checksum: String,
}

#[derive(serde::Deserialize)]
struct Space {
    width: usize,
    height: usize,
    space: HashMap<String, Vec<f64>>,
}

#[derive(serde::Deserialize)]
struct Mixed {
    pixels: Vec<f64>,
    targets: Vec<f64>,
}

#[derive(serde::Deserialize)]
struct Distribution {
    name: String,
    samples: usize,
    /// Values, and the share of samples that are not above each.
    points: Vec<[f64; 2]>,
}

fn read() -> Golden {
    serde_json::from_slice(&golden("augmentation.json")).unwrap()
}

/// As torchvision's automatic policies apply an operation of a name and a magnitude.
fn operation(name: &str, magnitude: f64) -> Operation {
    match name {
        "Identity" => Operation::Identity,
        "ShearX" => Operation::ShearX(magnitude),
        "ShearY" => Operation::ShearY(magnitude),
        "TranslateX" => Operation::TranslateX(magnitude as i64),
        "TranslateY" => Operation::TranslateY(magnitude as i64),
        "Rotate" => Operation::Rotate(magnitude),
        "Brightness" => Operation::Brightness(1.0 + magnitude),
        "Color" => Operation::Color(1.0 + magnitude),
        "Contrast" => Operation::Contrast(1.0 + magnitude),
        "Sharpness" => Operation::Sharpness(1.0 + magnitude),
        "Posterize" => Operation::Posterize(magnitude as u32),
        "Solarize" => Operation::Solarize(magnitude),
        "AutoContrast" => Operation::AutoContrast,
        "Equalize" => Operation::Equalize,
        "Hue" => Operation::Hue(magnitude),
        other => panic!("{other}"),
    }
}

/// Every value times its place's number, modulo 2^64.
fn checksum(pixels: &[u8]) -> String {
    let sum = pixels
        .iter()
        .zip(1u64..)
        .fold(0u64, |sum, (&value, place)| {
            let number = place.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            sum.wrapping_add(number.wrapping_mul(u64::from(value)))
        });
    format!("{sum:016x}")
}

#[test]
fn operations_equal_torchvisions_bit_for_bit() {
    let pictures = read().pictures;
    assert!(pictures.len() > 10);
    let mut wrong = Vec::new();
    for picture in &pictures {
        let Picture { height, width, .. } = *picture;
        let mut pixels = photo("augmented", height, width, 3);
        for value in &mut pixels {
            match picture.kind.as_str() {
                "photo" => {}
                "pale" => *value = *value / 4 + 100,
                _ => *value = 77,
            }
        }
        let image = Rgb {
            width,
            height,
            pixels,
        };
        assert!(picture.results.len() > 60);
        for (name, magnitude, sum) in &picture.results {
            let mut image = image.clone();
            operation(name, *magnitude).apply(&mut image);
            if checksum(&image.pixels) != *sum {
                let kind = &picture.kind;
                wrong.push(format!("{kind} {width} x {height}: {name} {magnitude}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ: {wrong:#?}", wrong.len());
}

#[test]
fn every_colours_hue_turns_as_pillow_turns_it() {
    let colours = (0..1u32 << 24).flat_map(|c| [(c >> 16) as u8, (c >> 8) as u8, c as u8]);
    let colours: Vec<u8> = colours.collect();
    for Cube { hue, checksum: sum } in read().cube {
        let mut image = Rgb {
            width: 4096,
            height: 4096,
            pixels: colours.clone(),
        };
        Operation::Hue(hue).apply(&mut image);
        assert_eq!(checksum(&image.pixels), sum, "{hue}");
    }
}

/// All operations of a policy, each with its share of the draws.
fn shares(space: &HashMap<String, Vec<f64>>) -> Vec<(Operation, f64)> {
    let mut shares: Vec<(Operation, f64)> = Vec::new();
    for (name, magnitudes) in space {
        for &magnitude in magnitudes {
            let share = 1.0 / (space.len() * magnitudes.len()) as f64;
            // A float32, which the reader of JSON may miss by a float64's last digit.
            let operation = operation(name, f64::from(magnitude as f32));
            // Steps of no strength, and those that are rounded to the same.
            match shares.iter_mut().find(|(known, _)| *known == operation) {
                Some((_, sum)) => *sum += share,
                None => shares.push((operation, share)),
            }
        }
    }
    shares
}

fn check_draws(space: &HashMap<String, Vec<f64>>, mut draw: impl FnMut() -> Vec<Operation>) {
    const DRAWS: usize = 100_000;
    let expected = shares(space);
    assert_eq!(space.len(), 14);
    let mut counts = vec![0usize; expected.len()];
    let mut total = 0;
    while total < DRAWS {
        for drawn in draw() {
            let at = expected.iter().position(|(known, _)| *known == drawn);
            counts[at.unwrap_or_else(|| panic!("{drawn:?} is not in torchvision's table"))] += 1;
            total += 1;
        }
    }
    for ((operation, share), count) in expected.iter().zip(counts) {
        let off = count as f64 / total as f64 - share;
        let deviation = (share * (1.0 - share) / total as f64).sqrt();
        assert!(
            off.abs() < 5.0 * deviation,
            "{operation:?}: {count} of {total}, expected {share}"
        );
    }
}

#[test]
fn policies_draw_what_torchvisions_draw() {
    let golden = read();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    check_draws(&golden.trivial, || vec![trivial_augment(&mut rng)]);
    assert_eq!(golden.rand.len(), 2);
    for space in &golden.rand {
        let size = [space.width, space.height];
        check_draws(&space.space, || rand_augment(size, &mut rng).to_vec());
    }
}

/// What the golden's distribution of a name is one of.
fn sample(name: &str, rng: &mut ChaCha8Rng) -> f64 {
    let words: Vec<&str> = name.split(' ').collect();
    let number = |at: usize| words[at].parse::<f64>().unwrap();
    let whole = |at: usize| number(at) as usize;
    match words[0] {
        "crop" => {
            let [columns, rows] = random_part(whole(1), whole(2), rng);
            match words[3] {
                "share" => (columns.len() * rows.len()) as f64 / (number(1) * number(2)),
                "ratio" => (columns.len() as f64 / rows.len() as f64).ln(),
                "left" => columns.start as f64,
                "top" => rows.start as f64,
                other => panic!("{other}"),
            }
        }
        "erased" => {
            // In ten tries one nearly always fits.
            let [columns, rows] = loop {
                if let Some(part) = erased_part([90, 60], rng) {
                    break part;
                }
            };
            match words[1] {
                "share" => (columns.len() * rows.len()) as f64 / 5400.0,
                "ratio" => (columns.len() as f64 / rows.len() as f64).ln(),
                "left" => columns.start as f64,
                "top" => rows.start as f64,
                other => panic!("{other}"),
            }
        }
        "mixup" => Mix::draw(number(1), 0.0, [90, 60], rng).unwrap().own(),
        "cutmix" => {
            let mix = Mix::draw(0.0, number(1), [90, 60], rng).unwrap();
            let Mix::Patch { columns, rows, own } = mix else {
                panic!("{mix:?}");
            };
            match words.get(2) {
                None => own,
                Some(&"left") => columns.start as f64,
                Some(&"right") => columns.end as f64,
                Some(&"top") => rows.start as f64,
                Some(_) => rows.end as f64,
            }
        }
        "jitter" => {
            let drawn = color_jitter(0.4, 0.1, rng);
            assert_eq!(drawn.len(), 4);
            let factor = |operation: &Operation| match (*operation, words[1]) {
                (Operation::Brightness(factor), "Brightness") => Some(factor),
                (Operation::Contrast(factor), "Contrast") => Some(factor),
                (Operation::Color(factor), "Color") => Some(factor),
                (Operation::Hue(turn), "Hue") => Some(turn),
                _ => None,
            };
            match words.get(2) {
                None => drawn.iter().find_map(factor).unwrap(),
                Some(_) => drawn.iter().position(|o| factor(o).is_some()).unwrap() as f64,
            }
        }
        other => panic!("{other}"),
    }
}

#[test]
fn random_parameters_are_distributed_as_torchvisions() {
    const SAMPLES: usize = 50_000;
    let distributions = read().distributions;
    assert!(distributions.len() > 30);
    for Distribution {
        name,
        samples,
        points,
    } in &distributions
    {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let drawn: Vec<f64> = (0..SAMPLES).map(|_| sample(name, &mut rng)).collect();
        for &[value, expected] in points {
            let below = drawn.iter().filter(|&&drawn| drawn <= value).count();
            let share = below as f64 / SAMPLES as f64;
            let each = 1.0 / SAMPLES as f64 + 1.0 / *samples as f64;
            let deviation = (expected * (1.0 - expected) * each).sqrt();
            assert!(
                (share - expected).abs() <= 5.0 * deviation + 1e-9,
                "{name}: {share} are at most {value}, torchvision's {expected}"
            );
        }
    }
}

#[test]
fn mixed_batches_equal_torchvisions() {
    let golden = read();
    let patch = Mix::Patch {
        columns: 1..4,
        rows: 0..2,
        own: 1.0 - 6.0 / 20.0,
    };
    for (mix, golden) in [(Mix::Blend(0.3217), golden.mixup), (patch, golden.cutmix)] {
        let mut pixels: Vec<f32> = uniform("mixed", 3 * 4 * 5 * 3).collect();
        mix.apply(&mut pixels, 4 * 5 * 3, 5);
        let expected: Vec<f32> = golden.pixels.iter().map(|&v| v as f32).collect();
        assert_eq!(pixels, expected, "{mix:?}");
        let targets = mixed_targets(&[2, 0, 2], mix.own(), 3);
        let expected: Vec<f32> = golden.targets.iter().map(|&v| v as f32).collect();
        assert_eq!(targets, expected, "{mix:?}");
    }
}

#[test]
fn both_mixes_have_their_turn_and_none_is_none() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    assert_eq!(Mix::draw(0.0, 0.0, [9, 9], &mut rng), None);
    let patches = (0..2000)
        .filter(|_| {
            matches!(
                Mix::draw(0.2, 1.0, [9, 9], &mut rng),
                Some(Mix::Patch { .. })
            )
        })
        .count();
    assert!((900..1100).contains(&patches), "{patches}");
}
