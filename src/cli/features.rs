use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};

use super::{Global, Outcome, photo};
use crate::data;
use crate::explain::{FeatureMaps, Inside, Order, feature_maps, stage_maps};
use crate::report::{self, feature_grid};
use crate::weights::{resolve, write_whole};

/// See what the layers of a network make of a photo
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sconce features photo.jpg                                 one picture for each stage
  sconce features photo.jpg -m resnet18 --layer layer1 layer3.1.conv2
  sconce features photo.jpg --layer features.4 --colormap viridis --order energy
  sconce features photo.jpg --layer features.18 --format npy   the numbers, [C, H, W] float32

Names of layers are those of torchvision's feature extraction: sconce models NAME lists them.")]
pub struct Arguments {
    /// The photo
    image: PathBuf,
    /// Nodes to show; a module's name is its last node [default: one node a stage]
    #[arg(long, value_name = "NAME", num_args = 1..)]
    layer: Vec<String>,
    /// One node of each stage, besides those named
    #[arg(long)]
    all_stages: bool,
    /// Folder for the files, LAYER.png each
    #[arg(short, long, value_name = "DIR", default_value = "features")]
    out: PathBuf,
    /// Show at most so many channels of a layer
    #[arg(long, value_name = "N", default_value = "64")]
    channels: NonZeroUsize,
    /// Which channels come first
    #[arg(long, value_enum, default_value_t = By::Index)]
    order: By,
    /// Colours
    #[arg(long, value_enum, default_value_t = Colormap::Gray)]
    colormap: Colormap,
    /// Pictures, or all channels as numbers for numpy.load
    #[arg(long, value_enum, default_value_t = Format::Png)]
    format: Format,
    /// Refuse images of more pixels
    #[arg(long, value_name = "N", default_value_t = super::MAX_PIXELS)]
    max_pixels: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    /// As the network numbers them
    Index,
    /// The strongest first
    Energy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Colormap {
    Gray,
    Viridis,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Png,
    Npy,
}

pub fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let model = resolve(&global.request())?;
    global.report_weights(&model);
    let inside = Inside::new(&model, &global.device()?)?;
    let mut nodes = Vec::new();
    for name in &arguments.layer {
        nodes.push(inside.find(name).context("--layer")?);
    }
    if arguments.all_stages || nodes.is_empty() {
        nodes.extend(stage_maps(&inside));
    }
    nodes.sort();
    nodes.dedup();
    let photo = photo::read(&arguments.image, arguments.max_pixels)?;
    let pixels = data::prepare(&photo, &model.preprocessing);
    let maps = feature_maps(&inside, &pixels, &nodes).context("--layer")?;
    for maps in &maps {
        let path = match arguments.format {
            Format::Png => picture(arguments, maps)?,
            Format::Npy => numbers(&arguments.out, maps)?,
        };
        writeln!(
            global.stdout(),
            "{}  {} x {} x {}",
            path.display(),
            maps.channels,
            maps.height,
            maps.width
        )?;
    }
    Ok(Outcome::AllDone)
}

fn picture(arguments: &Arguments, maps: &FeatureMaps) -> anyhow::Result<PathBuf> {
    let order = match arguments.order {
        By::Index => Order::Index,
        By::Energy => Order::Energy,
    };
    let colormap = match arguments.colormap {
        Colormap::Gray => report::Colormap::Gray,
        Colormap::Viridis => report::Colormap::Viridis,
    };
    let channels = maps.ordered(order, arguments.channels.get());
    let path = arguments.out.join(format!("{}.png", maps.name));
    feature_grid(maps, &channels, order == Order::Energy, colormap)?.write(&path)?;
    Ok(path)
}

fn numbers(folder: &Path, maps: &FeatureMaps) -> anyhow::Result<PathBuf> {
    let path = folder.join(format!("{}.npy", maps.name));
    let tensor = maps.tensor()?;
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    write_whole(&path, |temporary| {
        tensor.write_npy(temporary).map_err(std::io::Error::other)
    })
    .with_context(|| path.display().to_string())?;
    Ok(path)
}
