//! What to say where a device's memory is too small.

use candle_core::{Error, Result};

/// Whether a device had no memory left.
fn is_out_of_memory(error: &Error) -> bool {
    let text = error.to_string().to_lowercase();
    // CUDA's words, cuBLAS's and Metal's.
    [
        "out of memory",
        "out_of_memory",
        "alloc_failed",
        "failed to allocate",
    ]
    .iter()
    .any(|words| text.contains(words))
}

/// What came of a batch of `count` images; where memory was too small for it, an error that names the
/// largest batch that `pass` gets through, by halving.
///
/// # Errors
/// As `outcome`.
pub fn with_advice<T>(
    outcome: Result<T>,
    count: usize,
    mut pass: impl FnMut(usize) -> Result<()>,
) -> Result<T> {
    let error = match outcome {
        Err(error) if is_out_of_memory(&error) => error,
        other => return other,
    };
    let mut fits = count / 2;
    while fits > 0 {
        match pass(fits) {
            Ok(()) => break,
            Err(error) if is_out_of_memory(&error) => fits /= 2,
            Err(_) => return Err(error),
        }
    }
    let advice = match fits {
        0 => "not even one image fits: use a smaller network, or smaller images".to_string(),
        _ => format!("--batch-size {fits} fits"),
    };
    Err(Error::Msg(format!(
        "the device has not memory enough for a batch of {count} images ({advice})"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room_for(most: usize) -> impl Fn(usize) -> Result<()> {
        move |count| match count {
            _ if count > most => Err(Error::Msg("CUDA_ERROR_OUT_OF_MEMORY: out of memory".into())),
            _ => Ok(()),
        }
    }

    #[test]
    fn the_batch_that_fits_is_named() {
        let advice = |count: usize, most: usize| {
            let pass = room_for(most);
            with_advice(pass(count), count, pass).map_err(|e| e.to_string())
        };
        assert_eq!(advice(64, 64), Ok(()));
        let error = advice(64, 20).unwrap_err();
        assert!(
            error.contains("64 images (--batch-size 16 fits)"),
            "{error}"
        );
        let error = advice(3, 0).unwrap_err();
        assert!(error.contains("not even one image"), "{error}");
    }

    #[test]
    fn other_errors_stay_what_they_are() {
        let error = with_advice::<()>(Err(Error::Msg("broken".into())), 8, |_| Ok(()));
        assert_eq!(error.unwrap_err().to_string(), "broken");
        let mut passes = 0;
        let error = with_advice::<()>(Err(Error::Msg("out of memory".into())), 8, |_| {
            passes += 1;
            Err(Error::Msg("broken".into()))
        });
        assert_eq!(passes, 1);
        assert_eq!(error.unwrap_err().to_string(), "out of memory");
    }
}
