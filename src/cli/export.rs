use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{Global, Outcome};
use crate::weights::{DType, Dialect, resolve};

/// Write a network for other programs: safetensors or ONNX
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sconce export -m resnet50 --to onnx -o resnet50.onnx
  sconce export -m runs/flowers/model.safetensors --to onnx --dtype f16 -o flowers.onnx
  sconce export -m mobilenet_v2 --to safetensors --dialect timm -o mobilenetv2_100.safetensors

ONNX: input images [N, 3, H, W], output logits [N, classes]; class names and preprocessing are in
the metadata, as JSON.")]
pub struct Arguments {
    /// The file format
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Format,
    /// How weights are stored; f16 keeps vectors (norms, biases) in float32
    #[arg(long = "dtype", value_enum, value_name = "TYPE", default_value_t = Type::F32)]
    dtype: Type,
    /// Whose names a safetensors file has [default: sconce's own, torchvision's where it has them]
    #[arg(long, value_enum, value_name = "LIBRARY")]
    dialect: Option<Library>,
    /// Where to write it; `-o` replaces what is there
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Safetensors,
    Onnx,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    F32,
    F16,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Library {
    Torchvision,
    Timm,
}

pub fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let dialect = arguments.dialect.map(|library| match library {
        Library::Torchvision => Dialect::Torchvision,
        Library::Timm => Dialect::Timm,
    });
    let dtype = match arguments.dtype {
        Type::F32 => DType::F32,
        Type::F16 => DType::F16,
    };
    if arguments.to == Format::Onnx && dialect.is_some() {
        anyhow::bail!("export: --dialect is for --to safetensors (an ONNX file needs no names)");
    }
    let model = resolve(&global.request())?;
    global.report_weights(&model);
    match arguments.to {
        Format::Safetensors => model.export_safetensors(&arguments.output, dtype, dialect)?,
        Format::Onnx => model.export_onnx(&arguments.output, dtype)?,
    }
    writeln!(global.stdout(), "{}", arguments.output.display())?;
    Ok(Outcome::AllDone)
}
