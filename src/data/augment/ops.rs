//! Changes to a whole picture, as torchvision's functional transforms make them of Pillow images:
//! that is what its reference training uses. All are bit for bit the same
//! (tests/oracle/augmentation.py).

use crate::data::Rgb;

const CHANNELS: usize = 3;

/// A change to a picture, with its strength.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operation {
    Identity,
    /// Shifts each row by so many times its height over the bottom's edge; what comes in is black.
    ShearX(f64),
    /// The same for columns.
    ShearY(f64),
    /// Shifts to the right by so many pixels.
    TranslateX(i64),
    /// Shifts downwards by so many pixels.
    TranslateY(i64),
    /// Turns counterclockwise about the centre by so many degrees.
    Rotate(f64),
    /// A factor: 0 is black, 1 the picture.
    Brightness(f64),
    /// A factor: 0 is grey, 1 the picture.
    Color(f64),
    /// A factor: 0 is the mean grey, 1 the picture.
    Contrast(f64),
    /// A factor: 0 is smoothed, 1 the picture.
    Sharpness(f64),
    /// Keeps so many bits of each value.
    Posterize(u32),
    /// Inverts values from this one on.
    Solarize(f64),
    /// Stretches each channel to the whole range.
    AutoContrast,
    /// Makes each channel's values equally frequent.
    Equalize,
    /// Turns the hue by this part of the circle, -0.5 to 0.5.
    Hue(f64),
}

impl Operation {
    pub fn apply(self, image: &mut Rgb) {
        match self {
            Operation::Identity => {}
            Operation::ShearX(level) => shear(image, [level, 0.0]),
            Operation::ShearY(level) => shear(image, [0.0, level]),
            Operation::TranslateX(by) => warp(image, [1.0, 0.0, -(by as f64), 0.0, 1.0, 0.0]),
            Operation::TranslateY(by) => warp(image, [1.0, 0.0, 0.0, 0.0, 1.0, -(by as f64)]),
            Operation::Rotate(degrees) => rotate(image, degrees),
            Operation::Brightness(factor) => {
                map(image, |value| blend(0, value, factor as f32));
            }
            Operation::Contrast(factor) => {
                let mean = mean_grey(image);
                map(image, |value| blend(mean, value, factor as f32));
            }
            Operation::Color(factor) => {
                for pixel in pixels(image) {
                    let grey = grey(*pixel);
                    *pixel = pixel.map(|value| blend(grey, value, factor as f32));
                }
            }
            Operation::Sharpness(factor) => sharpness(image, factor as f32),
            Operation::Posterize(bits) => {
                let mask = !(0xffu32 >> bits.min(8)) as u8;
                map(image, |value| value & mask);
            }
            Operation::Solarize(threshold) => map(image, |value| {
                if f64::from(value) < threshold {
                    value
                } else {
                    255 - value
                }
            }),
            Operation::AutoContrast => by_histogram(image, stretch),
            Operation::Equalize => by_histogram(image, equalize),
            Operation::Hue(turn) => {
                // Truncated, then around the circle of 256 steps.
                let turn = (turn * 255.0) as i32 as u8;
                for pixel in pixels(image) {
                    let [h, s, v] = to_hsv(*pixel);
                    *pixel = from_hsv([h.wrapping_add(turn), s, v]);
                }
            }
        }
    }
}

fn pixels(image: &mut Rgb) -> &mut [[u8; CHANNELS]] {
    image.pixels.as_chunks_mut().0
}

/// Each value through a table.
fn map(image: &mut Rgb, of: impl Fn(u8) -> u8) {
    let table: [u8; 256] = std::array::from_fn(|value| of(value as u8));
    for value in &mut image.pixels {
        *value = table[usize::from(*value)];
    }
}

/// Between two values, or beyond them: truncated, and within 0 to 255.
fn blend(from: u8, to: u8, factor: f32) -> u8 {
    let (from, to) = (i32::from(from), i32::from(to));
    (from as f32 + factor * (to - from) as f32) as u8
}

/// Luma in fixed point.
fn grey([r, g, b]: [u8; CHANNELS]) -> u8 {
    let [r, g, b] = [r, g, b].map(u32::from);
    ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16) as u8
}

fn mean_grey(image: &mut Rgb) -> u8 {
    let pixels = pixels(image);
    let sum: u64 = pixels.iter().map(|&pixel| u64::from(grey(pixel))).sum();
    (sum as f64 / pixels.len().max(1) as f64 + 0.5) as u8
}

/// Away from, or towards, the picture under a 3 x 3 filter; the border is not filtered.
fn sharpness(image: &mut Rgb, factor: f32) {
    let (width, height) = (image.width, image.height);
    if width < 3 || height < 3 {
        return;
    }
    const EDGE: f32 = 1.0 / 13.0;
    const CENTRE: f32 = 5.0 / 13.0;
    let original = image.pixels.clone();
    let stride = width * CHANNELS;
    for y in 1..height - 1 {
        let row = |y: usize| &original[y * stride..(y + 1) * stride];
        let (above, here, below) = (row(y - 1), row(y), row(y + 1));
        let out = &mut image.pixels[y * stride..(y + 1) * stride];
        for x in CHANNELS..stride - CHANNELS {
            let at = |row: &[u8], x: usize| f32::from(row[x]);
            let sides = |row: &[u8], centre: f32| {
                at(row, x - CHANNELS) * EDGE + at(row, x) * centre + at(row, x + CHANNELS) * EDGE
            };
            // In Pillow's order of additions.
            let sum = 0.5 + sides(below, EDGE) + sides(here, CENTRE) + sides(above, EDGE);
            out[x] = blend(sum as u8, here[x], factor);
        }
    }
}

/// Each channel through a table that is made from its histogram.
fn by_histogram(image: &mut Rgb, table: fn(&[u64; 256]) -> [u8; 256]) {
    let pixels = pixels(image);
    let mut histograms = [[0; 256]; CHANNELS];
    for pixel in pixels.iter() {
        for (histogram, &value) in histograms.iter_mut().zip(pixel) {
            histogram[usize::from(value)] += 1;
        }
    }
    let tables = histograms.map(|histogram| table(&histogram));
    for pixel in pixels {
        for (value, table) in pixel.iter_mut().zip(&tables) {
            *value = table[usize::from(*value)];
        }
    }
}

fn unchanged() -> [u8; 256] {
    std::array::from_fn(|value| value as u8)
}

fn stretch(histogram: &[u64; 256]) -> [u8; 256] {
    let low = histogram.iter().position(|&n| n > 0).unwrap_or(0);
    let high = histogram.iter().rposition(|&n| n > 0).unwrap_or(0);
    if high <= low {
        return unchanged();
    }
    let scale = 255.0 / (high - low) as f64;
    let offset = -(low as f64) * scale;
    std::array::from_fn(|value| (value as f64 * scale + offset) as u8)
}

fn equalize(histogram: &[u64; 256]) -> [u8; 256] {
    let total: u64 = histogram.iter().sum();
    let last = histogram.iter().rev().find(|&&n| n > 0).copied();
    let step = (total - last.unwrap_or(0)) / 255;
    if step == 0 {
        return unchanged();
    }
    let mut sum = step / 2;
    histogram.map(|count| {
        let value = (sum / step).min(255) as u8;
        sum += count;
        value
    })
}

/// Hue and saturation in 8 bits and the highest value; in float32 where Pillow is.
fn to_hsv([r, g, b]: [u8; CHANNELS]) -> [u8; 3] {
    let (most, least) = (r.max(g).max(b), r.min(g).min(b));
    if most == least {
        return [0, 0, most];
    }
    let range = f32::from(most - least);
    let saturation = range / f32::from(most);
    let away = |value: u8| f32::from(most - value) / range;
    let [rc, gc, bc] = [away(r), away(g), away(b)];
    let sixth = if r == most {
        bc - gc
    } else if g == most {
        (2.0 + f64::from(rc) - f64::from(bc)) as f32
    } else {
        (4.0 + f64::from(gc) - f64::from(rc)) as f32
    };
    let turned = f64::from(sixth) / 6.0 + 1.0;
    let hue = (turned - turned.floor()) as f32;
    let byte = |value: f32| (f64::from(value) * 255.0) as u8;
    [byte(hue), byte(saturation), most]
}

fn from_hsv([h, s, v]: [u8; 3]) -> [u8; CHANNELS] {
    if s == 0 {
        return [v; CHANNELS];
    }
    let sixths = f64::from(f32::from(h)) * 6.0 / 255.0;
    let part = sixths.floor();
    let rest = (sixths - part) as f32;
    let s = (f64::from(s) / 255.0) as f32;
    let of_v = |share: f64| (f64::from(v) * share).round() as u8;
    let p = of_v(1.0 - f64::from(s));
    let q = of_v(1.0 - f64::from(s * rest));
    let t = of_v(1.0 - f64::from(s) * (1.0 - f64::from(rest)));
    match part as u8 % 6 {
        0 => [v, t, p],
        1 => [q, v, p],
        2 => [p, v, t],
        3 => [p, q, v],
        4 => [t, p, v],
        _ => [v, p, q],
    }
}

/// About the corner, as RandAugment's authors have it: torchvision's affine with an angle that
/// is the arc tangent of the level.
fn shear(image: &mut Rgb, levels: [f64; 2]) {
    let [x, y] = levels.map(|level| level.atan().to_degrees().to_radians());
    let a = (-y).cos() / y.cos();
    let b = -(-y).cos() * x.tan() / y.cos();
    let c = (-y).sin() / y.cos();
    let d = -(-y).sin() * x.tan() / y.cos() + 1.0;
    warp(image, [d, -b, 0.0, -c, a, 0.0]);
}

fn rotate(image: &mut Rgb, degrees: f64) {
    // Quarter turns move whole pixels, where they fit.
    let square = image.width == image.height;
    match degrees.rem_euclid(360.0) {
        0.0 => return,
        180.0 => return pixels(image).reverse(),
        90.0 if square => return quarter(image, |size, [y, x]| [x, size - 1 - y]),
        270.0 if square => return quarter(image, |size, [y, x]| [size - 1 - x, y]),
        _ => {}
    }
    let angle = -degrees.rem_euclid(360.0).to_radians();
    let (sin, cos) = (round15(angle.sin()), round15(angle.cos()));
    let (x, y) = (image.width as f64 / 2.0, image.height as f64 / 2.0);
    let by_x = cos * -x + sin * -y + 0.0 + x;
    let by_y = -sin * -x + cos * -y + 0.0 + y;
    warp(image, [cos, sin, by_x, -sin, cos, by_y]);
}

/// `from` says for each place of the result [row, column] where its pixel comes from.
fn quarter(image: &mut Rgb, from: fn(usize, [usize; 2]) -> [usize; 2]) {
    let size = image.width;
    let original = image.clone().pixels;
    let (original, _) = original.as_chunks::<CHANNELS>();
    for (index, pixel) in pixels(image).iter_mut().enumerate() {
        let [y, x] = from(size, [index / size, index % size]);
        *pixel = original[y * size + x];
    }
}

/// To 15 decimals, as Python's round.
fn round15(value: f64) -> f64 {
    format!("{value:.15}").parse().unwrap_or(value)
}

/// Each pixel of the result is taken where the matrix sends its centre, bilinearly and truncated;
/// what lies outside is black.
fn warp(image: &mut Rgb, [a, b, c, d, e, f]: [f64; 6]) {
    let (width, height) = (image.width, image.height);
    let source = std::mem::take(&mut image.pixels);
    let (source, _) = source.as_chunks::<CHANNELS>();
    let mut result = vec![0; source.len() * CHANNELS];
    let (out, _) = result.as_chunks_mut::<CHANNELS>();
    let row = |y: i64| {
        let y = y.clamp(0, height as i64 - 1) as usize;
        &source[y * width..(y + 1) * width]
    };
    for (index, out) in out.iter_mut().enumerate() {
        let (x, y) = ((index % width) as f64 + 0.5, (index / width) as f64 + 0.5);
        let (x, y) = (a * x + b * y + c, d * x + e * y + f);
        let inside = |at: f64, size: usize| at >= 0.0 && at < size as f64;
        if !inside(x, width) || !inside(y, height) {
            continue;
        }
        let (x, y) = (x - 0.5, y - 0.5);
        let (left, top) = (x.floor(), y.floor());
        let (dx, dy) = (x - left, y - top);
        let (left, top) = (left as i64, top as i64);
        let columns = [left, left + 1].map(|x| x.clamp(0, width as i64 - 1) as usize);
        let (upper, lower) = (row(top), row(top + 1));
        let between = |row: &[[u8; CHANNELS]], channel: usize| {
            let [left, right] = columns.map(|x| f64::from(row[x][channel]));
            left + (right - left) * dx
        };
        for (channel, out) in out.iter_mut().enumerate() {
            let upper = between(upper, channel);
            // Beyond the last row it is repeated, before the first one there is the first alone.
            let lower = between(lower, channel);
            *out = (upper + (lower - upper) * dy) as u8;
        }
    }
    image.pixels = result;
}
