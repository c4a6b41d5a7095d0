use std::fmt;
use std::str::FromStr;

use candle_core::Device;

use super::Precision;
use crate::ranks::local;

/// `--device`: where to compute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The fastest that this build and this machine have.
    Auto,
    Cpu,
    Cuda(usize),
    /// Several CUDA devices, for a process each.
    CudaEach(Vec<usize>),
    Metal,
}

/// A device that is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error(
        "--device {choice}: this sconce was built without it (build with `cargo build --release --features {feature}`, or leave --device out)"
    )]
    NotBuilt {
        choice: DeviceChoice,
        feature: &'static str,
    },
    #[error("--device {choice}: {reason} (leave --device out to take what there is)")]
    Unavailable {
        choice: DeviceChoice,
        reason: String,
    },
    #[error("--device {choice}: only finetune works on several devices (name one)")]
    Several { choice: DeviceChoice },
    #[error(
        "--precision {precision}: only CUDA devices compute so (leave it out, or give --device cuda)"
    )]
    Precision { precision: Precision },
}

impl DeviceChoice {
    /// Whether the machine has all of several devices, before a process is started for each.
    ///
    /// # Errors
    /// Where it has not.
    #[cfg(feature = "cuda")]
    pub fn check_each(&self) -> Result<(), DeviceError> {
        use candle_core::cuda_backend::cudarc::driver::CudaContext;

        let DeviceChoice::CudaEach(several) = self else {
            return Ok(());
        };
        let unavailable = |reason| DeviceError::Unavailable {
            choice: self.clone(),
            reason,
        };
        let count = CudaContext::device_count().map_err(|e| {
            let error = format!("{e:?}");
            unavailable(reason(&error))
        })?;
        match several.iter().find(|&&index| index >= count as usize) {
            Some(index) => Err(unavailable(format!(
                "there is no device {index}, of the {count} that the machine has"
            ))),
            None => Ok(()),
        }
    }

    /// Opens the device.
    ///
    /// # Errors
    /// Where the build or the machine lacks it; [`DeviceChoice::Auto`] always finds one.
    pub fn open(&self) -> Result<Device, DeviceError> {
        let unavailable = |e: candle_core::Error| DeviceError::Unavailable {
            choice: self.clone(),
            reason: reason(&e.to_string()),
        };
        let not_built = |feature| DeviceError::NotBuilt {
            choice: self.clone(),
            feature,
        };
        let cuda = |index| match cfg!(feature = "cuda") {
            true => Device::new_cuda(index).map_err(unavailable),
            false => Err(not_built("cuda")),
        };
        match self {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda(index) => cuda(*index),
            DeviceChoice::CudaEach(several) => {
                // Each of the processes that were started for them takes its own.
                let place = local::Place::found();
                match place.and_then(|place| several.get(place.rank).copied()) {
                    Some(index) => cuda(index),
                    None => Err(DeviceError::Several {
                        choice: self.clone(),
                    }),
                }
            }
            DeviceChoice::Metal if cfg!(feature = "metal") => {
                Device::new_metal(0).map_err(unavailable)
            }
            DeviceChoice::Metal => Err(not_built("metal")),
            DeviceChoice::Auto => Ok(DeviceChoice::Cuda(0)
                .open()
                .or_else(|_| DeviceChoice::Metal.open())
                .unwrap_or(Device::Cpu)),
        }
    }
}

/// What a device's error says to people: the first line, as a backtrace follows, and of a driver's error
/// with its code the words.
fn reason(error: &str) -> String {
    let line = error.lines().next().unwrap_or_default();
    let words = line.strip_prefix("DriverError(").and_then(|rest| {
        let (_, words) = rest.split_once('"')?;
        Some(words.split_once('"')?.0)
    });
    words.unwrap_or(line).to_string()
}

/// # Errors
/// Where the device does not compute so.
pub fn check_precision(device: &Device, precision: Precision) -> Result<(), DeviceError> {
    if precision == Precision::F32 || device.is_cuda() {
        return Ok(());
    }
    Err(DeviceError::Precision { precision })
}

fn all_differ(indices: &[usize]) -> bool {
    let mut sorted = indices.to_vec();
    sorted.sort_unstable();
    sorted.windows(2).all(|pair| pair[0] != pair[1])
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            "metal" => Ok(DeviceChoice::Metal),
            _ => {
                let indices: Option<Vec<usize>> = text
                    .strip_prefix("cuda:")
                    .map(|list| list.split(',').map(|index| index.parse().ok()).collect())
                    .unwrap_or_default();
                match indices.as_deref() {
                    Some([index]) => Ok(DeviceChoice::Cuda(*index)),
                    Some(several) if all_differ(several) => {
                        Ok(DeviceChoice::CudaEach(several.to_vec()))
                    }
                    _ => Err("expected auto, cpu, cuda, cuda:N, cuda:N,N or metal".to_string()),
                }
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(0) => f.write_str("cuda"),
            DeviceChoice::Cuda(index) => write!(f, "cuda:{index}"),
            DeviceChoice::CudaEach(several) => {
                let several: Vec<String> = several.iter().map(usize::to_string).collect();
                write!(f, "cuda:{}", several.join(","))
            }
            DeviceChoice::Metal => f.write_str("metal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_written_as_they_are_read() {
        for text in [
            "auto",
            "cpu",
            "cuda",
            "cuda:1",
            "cuda:0,1",
            "cuda:3,0,2",
            "metal",
        ] {
            let choice: DeviceChoice = text.parse().unwrap();
            assert_eq!(choice.to_string(), text);
        }
        assert_eq!("cuda:0".parse(), Ok(DeviceChoice::Cuda(0)));
        for wrong in [
            "", "gpu", "cuda:", "cuda:x", "cuda:0,", "cuda:1,1", "cuda:-1",
        ] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_drivers_error_is_told_in_its_words() {
        let error = "DriverError(CUDA_ERROR_NO_DEVICE, \"no device is there\")\n  0: backtrace";
        assert_eq!(reason(error), "no device is there");
        assert_eq!(reason("something else\nbelow"), "something else");
    }
}
