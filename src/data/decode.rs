//! From a file's bytes to 8-bit RGB, as Pillow's `convert("RGB")` gives it.

use std::io::Cursor;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

use super::jpeg;
use super::pipeline::Budget;
use super::preprocess::{reduction, window};
use crate::models::Preprocessing;

/// An 8-bit picture `[height, width, 3]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb {
    pub width: usize,
    pub height: usize,
    pub pixels: Vec<u8>,
}

impl Rgb {
    fn into_dynamic(self) -> Result<DynamicImage, ImageError> {
        let side = |side: usize| u32::try_from(side).ok();
        let image = side(self.width)
            .zip(side(self.height))
            .and_then(|(width, height)| RgbImage::from_raw(width, height, self.pixels));
        let broken = || ImageError::Broken("its size is not that of its pixels".into());
        image.map(DynamicImage::from).ok_or_else(broken)
    }
}

/// What a network needs of a picture.
#[derive(Clone, Debug)]
pub struct View {
    pub image: Rgb,
    /// Of the whole picture, as it is shown.
    pub width: usize,
    pub height: usize,
    /// A pixel of `image` is the mean of `by` x `by` of the picture.
    pub by: usize,
    /// The column and row, of the picture at that scale, at which `image` begins.
    pub origin: [usize; 2],
}

impl From<Rgb> for View {
    fn from(image: Rgb) -> Self {
        Self {
            width: image.width,
            height: image.height,
            by: 1,
            origin: [0, 0],
            image,
        }
    }
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("an empty file")]
    Empty,
    #[error("not an image in a format that is read (JPEG, PNG, WebP, GIF, BMP, TIFF, QOI, PNM)")]
    UnknownFormat,
    #[error("{0} images are not read (convert it to a plain JPEG or PNG first)")]
    UnreadFormat(&'static str),
    #[error("{width} x {height} pixels are more than {limit} (raise --max-pixels to read it)")]
    TooLarge { width: u32, height: u32, limit: u64 },
    #[error("the image is cut short")]
    Truncated,
    #[error("{0}")]
    Broken(String),
}

/// How images are decoded.
#[derive(Clone, Copy, Debug)]
pub struct Decoder {
    /// Images of more pixels are refused, by their header.
    pub max_pixels: u64,
    /// What shows through transparent pixels; None drops the alpha channel, as torchvision's
    /// loader does.
    pub background: Option<[u8; 3]>,
    /// Read pictures whole, also where a network would see little of what is left out.
    pub exact: bool,
}

/// Memory that a decoder may take beyond the picture itself.
const DECODER_SLACK: u64 = 16 << 20;
/// Largest picture in memory: four channels of 16 bits.
const BYTES_PER_PIXEL: u64 = 8;

impl Decoder {
    /// Width and height by the header, before orientation.
    ///
    /// # Errors
    /// Where the bytes are no image, or one of more pixels than are allowed.
    pub fn dimensions(&self, bytes: &[u8]) -> Result<(u32, u32), ImageError> {
        guarded(|| Ok(self.open(bytes)?.1.dimensions()))
    }

    /// Decodes, turns as the EXIF orientation says, and converts to RGB.
    ///
    /// # Errors
    /// Where the bytes are no image, a broken one, or one of more pixels than are allowed.
    pub fn decode(&self, bytes: &[u8]) -> Result<Rgb, ImageError> {
        guarded(|| {
            let (format, mut decoder) = self.open(bytes)?;
            let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
            let (width, height) = decoder.dimensions();
            let size = [width, height].map(|side| side as usize);
            let jpeg = format == ImageFormat::Jpeg;
            let mut image = match jpeg
                .then(|| jpeg::read(bytes, size, 1, size.map(|side| 0..side)))
                .flatten()
            {
                Some(image) => image.into_dynamic()?,
                None => DynamicImage::from_decoder(decoder).map_err(describe)?,
            };
            if jpeg && !jpeg_has_end(bytes) {
                return Err(ImageError::Truncated);
            }
            image.apply_orientation(orientation);
            Ok(self.convert(image))
        })
    }

    /// Decodes once there is memory for it.
    pub(super) fn decode_within(&self, bytes: &[u8], budget: &Budget) -> Result<Rgb, ImageError> {
        let (width, height) = self.dimensions(bytes)?;
        // The decoder's picture and its conversion to RGB, or a JPEG's coefficients, planes and picture;
        // and the file.
        let needed = u64::from(width) * u64::from(height) * 8 + 2 * bytes.len() as u64;
        let _share = budget.take(needed);
        self.decode(bytes)
    }

    /// Decodes what preprocessing needs of a picture: of a JPEG the part that is left by the crop, and of
    /// one that is far larger a smaller one; all else as `decode` does.
    ///
    /// # Errors
    /// As `decode`.
    pub fn decode_for(
        &self,
        preprocessing: &Preprocessing,
        bytes: &[u8],
    ) -> Result<View, ImageError> {
        self.decode_for_within(preprocessing, bytes, &Budget::default())
    }

    /// The same once there is memory for it.
    pub(super) fn decode_for_within(
        &self,
        preprocessing: &Preprocessing,
        bytes: &[u8],
        budget: &Budget,
    ) -> Result<View, ImageError> {
        let view = guarded(|| Ok(self.view(preprocessing, bytes, budget)))?;
        match view {
            Some(view) => Ok(view),
            None => Ok(self.decode_within(bytes, budget)?.into()),
        }
    }

    /// What preprocessing needs of a JPEG, where it is a plain one.
    fn view(&self, preprocessing: &Preprocessing, bytes: &[u8], budget: &Budget) -> Option<View> {
        if !bytes.starts_with(&[0xff, 0xd8]) {
            return None;
        }
        let (_, mut decoder) = self.open(bytes).ok()?;
        let (width, height) = decoder.dimensions();
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        drop(decoder);
        let size = [width, height].map(|side| side as usize);
        let turned = Turned::new(orientation);
        let shown = turned.size(size);
        let mut by = if self.exact {
            1
        } else {
            reduction(shown, preprocessing)
        };
        // Seen from the other side, the parts of pixels at the right and the bottom would lie elsewhere.
        while by > 1
            && orientation != Orientation::NoTransforms
            && size.iter().any(|side| side % by != 0)
        {
            by /= 2;
        }
        let window = window(shown, by, preprocessing);
        let origin = [window[0].start, window[1].start];
        // Planes and picture, and the coefficients of a progressive one; the file and its data.
        let cells = u64::from(width) * u64::from(height) / (by * by) as u64;
        let _share = budget.take(cells * if by > 1 { 20 } else { 8 } + 2 * bytes.len() as u64);
        let stored = turned.stored(window, size.map(|side| side.div_ceil(by)));
        let mut image = jpeg::read(bytes, size, by, stored)?.into_dynamic().ok()?;
        image.apply_orientation(orientation);
        let [width, height] = shown;
        Some(View {
            image: self.convert(image),
            width,
            height,
            by,
            origin,
        })
    }

    fn open<'a>(
        &self,
        bytes: &'a [u8],
    ) -> Result<(ImageFormat, impl ImageDecoder + 'a), ImageError> {
        if bytes.is_empty() {
            return Err(ImageError::Empty);
        }
        if let Some(name) = unread_format(bytes) {
            return Err(ImageError::UnreadFormat(name));
        }
        let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
        let Some(format) = reader.format() else {
            return Err(ImageError::UnknownFormat);
        };
        let within = |pixels: u64| {
            let mut limits = Limits::no_limits();
            let bytes = pixels.saturating_mul(BYTES_PER_PIXEL);
            limits.max_alloc = Some(bytes.saturating_add(DECODER_SLACK));
            limits
        };
        reader.limits(within(self.max_pixels));
        let mut decoder = reader.into_decoder().map_err(describe)?;
        let (width, height) = decoder.dimensions();
        if width == 0 || height == 0 {
            return Err(ImageError::Broken("an image without pixels".into()));
        }
        if u64::from(width) * u64::from(height) > self.max_pixels {
            return Err(ImageError::TooLarge {
                width,
                height,
                limit: self.max_pixels,
            });
        }
        // No more than a picture of that size may take, however its parts are declared.
        let limits = within(u64::from(width) * u64::from(height));
        decoder.set_limits(limits).map_err(describe)?;
        Ok((format, decoder))
    }

    fn convert(self, image: DynamicImage) -> Rgb {
        // Of 16-bit samples the upper half counts: Pillow reads RGB so, and clips grey to white.
        let high = |v: u16| (v >> 8) as u8;
        let grey = |v: u8| [v; 3];
        let (width, height) = (image.width() as usize, image.height() as usize);
        let over = |[r, g, b]: [u8; 3], alpha: u8| match self.background {
            None => [r, g, b],
            Some(back) => [
                blend(r, back[0], alpha),
                blend(g, back[1], alpha),
                blend(b, back[2], alpha),
            ],
        };
        let pixels: Vec<u8> = match image {
            DynamicImage::ImageRgb8(image) => image.into_raw(),
            DynamicImage::ImageLuma8(image) => {
                image.into_raw().into_iter().flat_map(grey).collect()
            }
            DynamicImage::ImageLumaA8(image) => {
                let pixels = image.pixels().map(|p| p.0);
                pixels.flat_map(|[l, a]| over(grey(l), a)).collect()
            }
            DynamicImage::ImageRgba8(image) => {
                let pixels = image.pixels().map(|p| p.0);
                pixels.flat_map(|[r, g, b, a]| over([r, g, b], a)).collect()
            }
            DynamicImage::ImageLuma16(image) => image
                .into_raw()
                .into_iter()
                .flat_map(|l| grey(high(l)))
                .collect(),
            DynamicImage::ImageLumaA16(image) => {
                let pixels = image.pixels().map(|p| p.0.map(high));
                pixels.flat_map(|[l, a]| over(grey(l), a)).collect()
            }
            DynamicImage::ImageRgb16(image) => image.into_raw().into_iter().map(high).collect(),
            DynamicImage::ImageRgba16(image) => {
                let pixels = image.pixels().map(|p| p.0.map(high));
                pixels.flat_map(|[r, g, b, a]| over([r, g, b], a)).collect()
            }
            other => other.into_rgb8().into_raw(),
        };
        Rgb {
            width,
            height,
            pixels,
        }
    }
}

/// How the axes of a stored picture lie in the one that is shown.
struct Turned {
    /// Rows are shown as columns.
    swapped: bool,
    /// Stored columns and rows are counted from the other side.
    mirrored: [bool; 2],
}

impl Turned {
    fn new(orientation: Orientation) -> Self {
        let (swapped, mirrored) = match orientation {
            Orientation::NoTransforms => (false, [false, false]),
            Orientation::FlipHorizontal => (false, [true, false]),
            Orientation::FlipVertical => (false, [false, true]),
            Orientation::Rotate180 => (false, [true, true]),
            Orientation::Rotate90FlipH => (true, [false, false]),
            Orientation::Rotate90 => (true, [false, true]),
            Orientation::Rotate270 => (true, [true, false]),
            Orientation::Rotate270FlipH => (true, [true, true]),
        };
        Self { swapped, mirrored }
    }

    /// Width and height as they are shown.
    fn size(&self, [width, height]: [usize; 2]) -> [usize; 2] {
        if self.swapped {
            [height, width]
        } else {
            [width, height]
        }
    }

    /// The stored columns and rows of a window, of a picture stored in that size.
    fn stored(&self, [columns, rows]: [Range<usize>; 2], size: [usize; 2]) -> [Range<usize>; 2] {
        let mut window = if self.swapped {
            [rows, columns]
        } else {
            [columns, rows]
        };
        for axis in 0..2 {
            if self.mirrored[axis] {
                let Range { start, end } = window[axis];
                window[axis] = size[axis] - end..size[axis] - start;
            }
        }
        window
    }
}

/// `value` over `back`, rounded.
fn blend(value: u8, back: u8, alpha: u8) -> u8 {
    let (value, back, alpha) = (u32::from(value), u32::from(back), u32::from(alpha));
    ((value * alpha + back * (255 - alpha) + 127) / 255) as u8
}

/// Runs a decoder such that its panic is an error of that one image.
fn guarded<T>(decode: impl FnOnce() -> Result<T, ImageError>) -> Result<T, ImageError> {
    catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_| Err(ImageError::Broken("the decoder gave up on it".into())))
}

fn describe(error: image::ImageError) -> ImageError {
    use image::ImageError as E;
    match error {
        E::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => ImageError::Truncated,
        E::IoError(e) => ImageError::Io(e),
        E::Limits(_) => ImageError::Broken("it needs more memory than --max-pixels allows".into()),
        other => {
            // Some decoders' messages run over several lines.
            let text = other.to_string();
            ImageError::Broken(text.lines().collect::<Vec<_>>().join(" "))
        }
    }
}

/// Formats that people have and that are not read, by their first bytes.
fn unread_format(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [0xff, 0x0a, ..] | [0, 0, 0, 12, b'J', b'X', b'L', b' ', ..] => return Some("JPEG XL"),
        [0xff, 0xd8, ..] => return unread_jpeg(bytes),
        _ => {}
    }
    let brand = bytes.get(4..12)?;
    match brand.strip_prefix(b"ftyp")? {
        b"avif" | b"avis" => Some("AVIF"),
        b"heic" | b"heix" | b"heim" | b"heis" | b"hevc" | b"mif1" | b"msf1" => Some("HEIC"),
        _ => None,
    }
}

/// The segments of a JPEG before its first scan: marker, and where what follows it begins.
fn jpeg_segments(bytes: &[u8]) -> impl Iterator<Item = (u8, usize)> {
    let mut at = 2;
    std::iter::from_fn(move || {
        while let Some([0xff, 0xff]) = bytes.get(at..at + 2) {
            at += 1;
        }
        let &[0xff, marker, high, low] = bytes.get(at..at + 4)? else {
            return None;
        };
        let body = at + 4;
        at += 2 + usize::from(u16::from_be_bytes([high, low]));
        Some((marker, body))
    })
}

const START_OF_SCAN: u8 = 0xda;

/// Kinds of JPEG that are not read, by the marker of the frame.
fn unread_jpeg(bytes: &[u8]) -> Option<&'static str> {
    let (marker, body) = jpeg_segments(bytes).find(|&(marker, _)| {
        marker == START_OF_SCAN
            || matches!(marker, 0xc0..=0xcf) && ![0xc4, 0xc8, 0xcc].contains(&marker)
    })?;
    match marker {
        0xc0..=0xc2 if bytes.get(body) == Some(&12) => Some("12-bit JPEG"),
        0xc3 | 0xc7 | 0xcb | 0xcf => Some("lossless JPEG"),
        0xc9 | 0xca | 0xcd | 0xce => Some("arithmetic-coded JPEG"),
        _ => None,
    }
}

/// Whether a JPEG's compressed data goes on to the end marker. The decoder fills what is missing
/// with grey, without a word.
fn jpeg_has_end(bytes: &[u8]) -> bool {
    // Segments before the first scan have lengths; a thumbnail in one has an end marker of its own.
    let Some((_, scan)) = jpeg_segments(bytes).find(|&(marker, _)| marker == START_OF_SCAN) else {
        return false;
    };
    let scan = bytes.get(scan..).unwrap_or_default();
    memchr::memmem::find(scan, &[0xff, 0xd9]).is_some()
}

/// A colour: a common name, `#rgb` or `#rrggbb`.
///
/// # Errors
/// What was expected, where it is none.
pub fn parse_color(text: &str) -> Result<[u8; 3], String> {
    let named = match text.to_ascii_lowercase().as_str() {
        "black" => Some([0, 0, 0]),
        "white" => Some([255, 255, 255]),
        "gray" | "grey" => Some([128, 128, 128]),
        "red" => Some([255, 0, 0]),
        "green" => Some([0, 128, 0]),
        "blue" => Some([0, 0, 255]),
        _ => None,
    };
    let hex = || {
        let digits = text.strip_prefix('#')?;
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let value = u32::from_str_radix(digits, 16).ok()?;
        match digits.len() {
            6 => Some([value >> 16, value >> 8, value].map(|v| v as u8)),
            3 => Some([value >> 8, value >> 4, value].map(|v| (v & 15) as u8 * 17)),
            _ => None,
        }
    };
    named
        .or_else(hex)
        .ok_or_else(|| "expected white, black, gray, red, green, blue, #rgb or #rrggbb".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colors_are_names_or_hex() {
        assert_eq!(parse_color("White"), Ok([255; 3]));
        assert_eq!(parse_color("#1a2B3c"), Ok([0x1a, 0x2b, 0x3c]));
        assert_eq!(parse_color("#fa0"), Ok([0xff, 0xaa, 0]));
        for bad in [
            "", "#", "#12", "#12345", "#1234567", "mauvish", "#ggg", "#+12",
        ] {
            assert!(parse_color(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn blending_is_exact_at_its_ends() {
        for value in 0..=255 {
            assert_eq!(blend(value, 7, 255), value);
            assert_eq!(blend(value, 7, 0), 7);
        }
    }
}
