use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::{Global, Outcome, ReportFormat};
use crate::explain::{self, Difference, Kernel, differences};
use crate::report::{filters, histograms, write_differences, write_kernels};
use crate::weights::{Model, Request, WeightsChoice, resolve};

/// See what the weights of a network look like
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sconce kernels -m resnet18                         a row a tensor
  sconce kernels --layer features.0 --format json
  sconce kernels -m resnet18 --plot weights.png      histograms
  sconce kernels -m resnet18 --filters filters.png   the first layer as colours
  sconce kernels --diff runs/flowers/model.safetensors   what fine-tuning moved")]
pub struct Arguments {
    /// Only tensors of these layers: names, or what names begin with
    #[arg(long, value_name = "NAME", num_args = 1..)]
    layer: Vec<String>,
    /// How to print
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    format: ReportFormat,
    /// Draw a histogram of every tensor
    #[arg(long, value_name = "FILE.png")]
    plot: Option<PathBuf>,
    /// Draw the filters of the first layer
    #[arg(long, value_name = "FILE.png")]
    filters: Option<PathBuf>,
    /// Print how far another network's tensors are from this one's instead
    #[arg(long, value_name = "NAME|FILE")]
    diff: Option<String>,
}

#[derive(Serialize)]
struct Differences<'a> {
    tensors: &'a [Difference],
    /// Only in one, or of another shape.
    others: &'a [String],
}

pub fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let model = resolve(&global.request())?;
    global.report_weights(&model);
    let all = explain::kernels(&model)?;
    let kernels = chosen(&model, &all, &arguments.layer)?;
    let mut out = global.stdout();
    match &arguments.diff {
        Some(other) => {
            let request = Request {
                model: other.clone(),
                weights: WeightsChoice::Published,
                ..global.request()
            };
            let other = resolve(&request).context("--diff")?;
            let others = explain::kernels(&other)?;
            let others: Vec<Kernel> = match arguments.layer.is_empty() {
                true => others,
                false => chosen(&other, &others, &arguments.layer)?,
            };
            let (tensors, rest) = differences(&kernels, &others);
            match arguments.format {
                ReportFormat::Text => {
                    write_differences([&model.name, &other.name], &tensors, &rest, &mut out)?;
                }
                ReportFormat::Json => {
                    let differences = Differences {
                        tensors: &tensors,
                        others: &rest,
                    };
                    serde_json::to_writer(&mut out, &differences)?;
                    writeln!(out)?;
                }
            }
        }
        None => match arguments.format {
            ReportFormat::Text => write_kernels(&model.name, &kernels, &mut out)?,
            ReportFormat::Json => {
                serde_json::to_writer(&mut out, &kernels)?;
                writeln!(out)?;
            }
        },
    }
    if let Some(path) = &arguments.plot {
        histograms(&model.name, &kernels)?.write(path)?;
    }
    if let Some(path) = &arguments.filters {
        let first = all.iter().find(|k| k.shape.len() == 4 && k.shape[1] == 3);
        let first = first.context("--filters: the network has no convolution on RGB")?;
        filters(first)?.write(path)?;
    }
    Ok(Outcome::AllDone)
}

/// Those whose names are or begin with one of the layers.
fn chosen(model: &Model, kernels: &[Kernel], layers: &[String]) -> anyhow::Result<Vec<Kernel>> {
    let within = |kernel: &Kernel, layer: &str| {
        kernel
            .name
            .strip_prefix(layer)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    for layer in layers {
        if !kernels.iter().any(|kernel| within(kernel, layer)) {
            let near = explain::nearest(layer, kernels.iter().map(|k| &*k.name));
            anyhow::bail!(
                "--layer {layer}: {} has no tensor of that name (near it: {})",
                model.name,
                near.join(", ")
            );
        }
    }
    let wanted = |k: &&Kernel| layers.is_empty() || layers.iter().any(|l| within(k, l));
    Ok(kernels.iter().filter(wanted).cloned().collect())
}
