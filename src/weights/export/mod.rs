//! Writing a network for others: safetensors under any dialect's names, and ONNX.

mod onnx;

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use candle_core::Device;
use candle_nn::var_builder::VarBuilder;
use half::f16;
use safetensors::{Dtype, SafeTensorError, View};

use super::dialects::{self, Dialect};
use super::write::write_whole;
use super::{Description, FORMAT_VERSION, Model, WeightsError};
use crate::exec::params::{Params, fetch};
use crate::graph::{Op, Parameter};

/// How values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    F32,
    /// Matrices and kernels in float16; vectors (norms, biases), which are few and feel it, in
    /// float32.
    F16,
}

impl DType {
    fn is_half(self, shape: &[usize]) -> bool {
        self == DType::F16 && shape.len() > 1
    }
}

/// Why a network cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(
        "{name}: {dialect} has no such network: its names would load there and give other logits (leave --dialect out)"
    )]
    Dialect { name: String, dialect: Dialect },
}

impl Model {
    /// What a model file says of this network.
    pub fn description(&self) -> Description {
        Description {
            format_version: FORMAT_VERSION,
            name: self.name.clone(),
            architecture: self.architecture,
            labels: self.labels.clone(),
            preprocessing: self.preprocessing,
            temperature: self.temperature,
        }
    }

    /// Writes a model file: safetensors with all that is needed to use it, under our names or
    /// those of `dialect`.
    ///
    /// # Errors
    /// Where the dialect does not have the network, or reading or writing fails.
    pub fn export_safetensors(
        &self,
        path: &Path,
        dtype: DType,
        dialect: Option<Dialect>,
    ) -> Result<(), ExportError> {
        let tables = dialects::tables(&self.architecture);
        let wanted = |table: &&dialects::Table| {
            table.architecture == self.architecture && dialect.is_none_or(|d| d == table.dialect)
        };
        let Some(table) = tables.iter().find(wanted) else {
            return Err(ExportError::Dialect {
                name: self.name.clone(),
                dialect: dialect.unwrap_or(Dialect::Sconce),
            });
        };
        let params = Params::new(self.source.clone(), self.seed);
        let vb = params.var_builder(&Device::Cpu);
        let failure = RefCell::new(None);
        let mut tensors = Vec::new();
        for parameter in self.graph.parameters() {
            let theirs = table.theirs(&parameter.name);
            let name = theirs.as_ref().and_then(|t| t.names.first().cloned());
            let mut shape = parameter.shape.clone();
            if theirs.is_some_and(|t| t.pointwise) {
                shape.extend([1, 1]);
            }
            let stored = Stored {
                vb: &vb,
                parameter,
                shape,
                dtype,
                failure: &failure,
            };
            // Tables that are exported with have a row for every parameter.
            tensors.push((name.unwrap_or_else(|| parameter.name.clone()), stored));
        }
        let text = serde_json::to_string(&self.description()).unwrap_or_default();
        let metadata = [("format", "pt".to_string()), ("sconce", text)];
        let metadata = metadata.map(|(key, value)| (key.to_string(), value));
        let written = write_whole(path, |temporary| {
            let metadata = Some(HashMap::from(metadata));
            let written = safetensors::serialize_to_file(tensors, metadata, temporary);
            written.map_err(|e| match e {
                SafeTensorError::IoError(e) => e,
                other => io::Error::other(other.to_string()),
            })?;
            failure.take().map_or(Ok(()), Err)
        });
        written.map_err(|error| io_error(path, error))
    }

    /// Writes an ONNX file of opset 17: input `images` `[N, 3, H, W]`, output `logits`
    /// `[N, classes]`, with the class names (`labels`), `preprocessing`, `temperature` and the
    /// description of a model file (`sconce`) as JSON in the metadata.
    ///
    /// # Errors
    /// Where reading or writing fails.
    pub fn export_onnx(&self, path: &Path, dtype: DType) -> Result<(), ExportError> {
        let params = Params::new(self.source.clone(), self.seed);
        let vb = params.var_builder(&Device::Cpu);
        let json = |value: serde_json::Result<String>| value.unwrap_or_default();
        let metadata = [
            ("labels", json(serde_json::to_string(&self.labels))),
            (
                "preprocessing",
                json(serde_json::to_string(&self.preprocessing)),
            ),
            ("temperature", self.temperature.to_string()),
            ("sconce", json(serde_json::to_string(&self.description()))),
        ];
        let written = write_whole(path, |temporary| {
            let mut out = BufWriter::new(File::create(temporary)?);
            let values = |parameter: &Parameter| values(&vb, parameter);
            let size = [self.input_size(); 2];
            onnx::write(&self.graph, size, dtype, &metadata, values, &mut out)?;
            out.flush()
        });
        written.map_err(|error| io_error(path, error))
    }

    /// Height and width of the images that a network of fixed size takes: those that positions
    /// were learned on, else those of the preprocessing.
    fn input_size(&self) -> usize {
        let learned = self.graph.nodes().iter().find_map(|node| match node.op {
            Op::PositionEmbedding { grid, patch, .. } => Some(grid * patch),
            _ => None,
        });
        learned.unwrap_or(self.preprocessing.crop)
    }
}

fn io_error(path: &Path, error: io::Error) -> ExportError {
    ExportError::Weights(WeightsError::Io {
        path: path.display().to_string(),
        error,
    })
}

/// A parameter as it is stored: read when its place in the file has come.
struct Stored<'a> {
    vb: &'a VarBuilder<'a>,
    parameter: &'a Parameter,
    shape: Vec<usize>,
    dtype: DType,
    /// The first failure to read one; the library that writes the file does not ask.
    failure: &'a RefCell<Option<io::Error>>,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype.is_half(&self.parameter.shape) {
            true => Dtype::F16,
            false => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        let written = values(self.vb, self.parameter)
            .and_then(|values| write_values(&values, self.dtype, self.parameter, &mut bytes));
        if let Err(error) = written {
            self.failure.borrow_mut().get_or_insert(error);
            bytes.resize(self.data_len(), 0);
        }
        bytes.into()
    }

    fn data_len(&self) -> usize {
        let size = match self.dtype() {
            Dtype::F16 => 2,
            _ => 4,
        };
        self.parameter.num_elements() * size
    }
}

fn values(vb: &VarBuilder, parameter: &Parameter) -> io::Result<Vec<f32>> {
    fetch(vb, parameter)
        .and_then(|tensor| tensor.flatten_all()?.to_vec1())
        .map_err(|e| io::Error::other(e.to_string()))
}

/// Writes values as they are stored.
fn write_values(
    values: &[f32],
    dtype: DType,
    parameter: &Parameter,
    out: &mut impl Write,
) -> io::Result<()> {
    let half = dtype.is_half(&parameter.shape);
    for &value in values {
        if half {
            let rounded = f16::from_f32(value);
            if rounded.is_infinite() && value.is_finite() {
                let name = &parameter.name;
                return Err(io::Error::other(format!(
                    "tensor {name}: {value} is beyond float16 (use --dtype f32)"
                )));
            }
            out.write_all(&rounded.to_le_bytes())?;
        } else {
            out.write_all(&value.to_le_bytes())?;
        }
    }
    Ok(())
}
