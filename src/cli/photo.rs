//! Reading the one photo that a command looks at.

use std::path::Path;

use crate::data::{Decoder, ImageError, Input, MAX_FILE_BYTES, Rgb};

/// Decodes a photo; `-` is standard input.
///
/// # Errors
/// Names the file.
pub fn read(path: &Path, max_pixels: u64) -> anyhow::Result<Rgb> {
    let input = if path.as_os_str() == "-" {
        Input::Stdin
    } else {
        Input::File(path.to_path_buf())
    };
    let decoder = Decoder {
        max_pixels,
        background: None,
        exact: true,
    };
    let decode = || -> Result<Rgb, ImageError> { decoder.decode(&input.read(MAX_FILE_BYTES)?) };
    decode().map_err(|error| anyhow::anyhow!("{}: {error}", input.name().escape_debug()))
}
