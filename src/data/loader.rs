use super::pipeline::{Budget, Next, Pipeline};
use super::{Decoder, Found, ImageError, Input, InputError, MAX_FILE_BYTES, crop_view, normalize};
use crate::models::Preprocessing;
use std::time::Duration;

/// An image ready for the network.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Of the picture, as it is shown.
    pub width: usize,
    pub height: usize,
    /// `[crop, crop, 3]`, normalised.
    pub pixels: Vec<f32>,
}

/// One input, read or not.
#[derive(Debug)]
pub struct Loaded {
    pub name: String,
    pub result: Result<Prepared, String>,
}

/// Decodes and prepares inputs ahead of the network, in input order.
pub struct Loader(Pipeline<Loaded>);

impl Loader {
    /// Starts to read `inputs` with so many threads.
    ///
    /// # Errors
    /// Where threads cannot be started.
    pub fn start(
        inputs: impl Iterator<Item = Found> + Send + 'static,
        decoder: Decoder,
        preprocessing: Preprocessing,
        threads: usize,
    ) -> std::io::Result<Self> {
        let work = move |found: Found, budget: &Budget| match found {
            Ok(input) => Loaded {
                name: input.name(),
                result: load(&input, &decoder, &preprocessing, budget).map_err(|e| e.to_string()),
            },
            Err(InputError { name, reason }) => Loaded {
                name,
                result: Err(reason),
            },
        };
        Ok(Self(Pipeline::start(inputs, threads, work)?))
    }

    /// The next image in input order; with `wait`, gives up after that time.
    pub fn next(&self, wait: Option<Duration>) -> Next<Loaded> {
        self.0.next(wait)
    }
}

fn load(
    input: &Input,
    decoder: &Decoder,
    preprocessing: &Preprocessing,
    budget: &Budget,
) -> Result<Prepared, ImageError> {
    let bytes = input.read(MAX_FILE_BYTES)?;
    let picture = decoder.decode_for_within(preprocessing, &bytes, budget)?;
    drop(bytes);
    Ok(Prepared {
        width: picture.width,
        height: picture.height,
        pixels: normalize(&crop_view(&picture, preprocessing), preprocessing),
    })
}
