//! Images in: finding them, decoding, and the preprocessing that a network was trained with.

mod decode;
mod input;
mod loader;
mod preprocess;
mod resize;

pub use decode::{Decoder, ImageError, Rgb, parse_color};
pub use input::{Input, InputError, Inputs, PathList};
pub use loader::{Loaded, Loader, Next, Prepared, THREAD_NAME};
pub use preprocess::{crop_pixels, mirror, prepare};
