//! Small pictures inside a page.

use std::io::Cursor;

use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::imageops::{FilterType, resize};
use image::{ExtendedColorType, ImageEncoder, RgbImage};

use super::data_uri;
use crate::data::{Decoder, Picture};

/// A picture as a page shows it.
pub struct Thumbnail {
    /// `data:image/...`
    pub uri: String,
    /// So small that it is shown larger than it is.
    pub small: bool,
}

/// Longest side, in pixels: sharp on dense screens too.
const SIDE: u32 = 240;
const QUALITY: u8 = 80;

/// None where the picture cannot be read.
pub fn thumbnail(picture: &Picture, decoder: &Decoder) -> Option<Thumbnail> {
    let decoded = picture.decode(decoder).ok()?;
    let (width, height) = (decoded.width as u32, decoded.height as u32);
    let image = RgbImage::from_raw(width, height, decoded.pixels)?;
    let longest = width.max(height);
    let mut out = Cursor::new(Vec::new());
    if longest <= 64 {
        // Each pixel counts.
        let png = PngEncoder::new(&mut out);
        png.write_image(&image, width, height, ExtendedColorType::Rgb8)
            .ok()?;
        let uri = data_uri("image/png", out.get_ref());
        return Some(Thumbnail { uri, small: true });
    }
    let image = if longest > SIDE {
        let scaled = |side: u32| (u64::from(side) * u64::from(SIDE) / u64::from(longest)).max(1);
        resize(
            &image,
            scaled(width) as u32,
            scaled(height) as u32,
            FilterType::Triangle,
        )
    } else {
        image
    };
    let jpeg = JpegEncoder::new_with_quality(&mut out, QUALITY);
    let size = image.dimensions();
    jpeg.write_image(&image, size.0, size.1, ExtendedColorType::Rgb8)
        .ok()?;
    let uri = data_uri("image/jpeg", out.get_ref());
    Some(Thumbnail { uri, small: false })
}
