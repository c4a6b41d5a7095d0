use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_core::{Device, Tensor};
use clap::{Args, ValueEnum};

use super::{Global, Outcome, complain, photo};
use crate::data::{self, Inputs};
use crate::explain::{ExplainError, Inside, Map, attention_maps, grad_cam, last_map};
use crate::graph::{NodeId, Op};
use crate::models::Preprocessing;
use crate::report::{Overlay, Plot, Ranking, contact_sheet};
use crate::weights::{Model, match_classes, resolve, write_whole};

/// See where in a photo a network saw what it says
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sconce explain photo.jpg                            writes explain.png
  sconce explain photo.jpg --class 'tabby' -o tabby.png
  sconce explain photos/ -o sheet.png                 all photos on one sheet
  sconce explain photo.jpg -m resnet50 --layer layer3
  sconce explain photo.jpg -m vit_b_16                attention rollout
  sconce explain photo.jpg -m vit_b_16 --layer encoder.layers.encoder_layer_3 --head 5")]
pub struct Arguments {
    /// Photos: files, folders (with all below them), quoted globs
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,
    /// Grad-CAM, or attention [default: attention where the network has it]
    #[arg(long, value_enum)]
    method: Option<Method>,
    /// Grad-CAM: the node whose maps are weighed [default: the last]. Attention: one layer instead
    /// of the rollout through all
    #[arg(long, value_name = "NAME")]
    layer: Option<String>,
    /// Attention: one head instead of the mean of all [needs no --layer: the last]
    #[arg(long, value_name = "N")]
    head: Option<usize>,
    /// The class to look for, by index or label [default: the most probable one]
    #[arg(long, value_name = "INDEX|LABEL")]
    class: Option<String>,
    /// The picture to write; several photos make one sheet
    #[arg(short, long, value_name = "FILE.png", default_value = "explain.png")]
    out: PathBuf,
    /// Write the map of a single photo as numbers too, for numpy.load: [H, W] float32
    #[arg(long, value_name = "FILE.npy")]
    raw: Option<PathBuf>,
    /// Refuse images of more pixels
    #[arg(long, value_name = "N", default_value_t = super::MAX_PIXELS)]
    max_pixels: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Method {
    GradCam,
    Attention,
}

/// Photos of a sheet.
const MOST_PHOTOS: usize = 60;
/// A photo is shown as large as this, or a little larger, in whole multiples of what the network sees.
const SHOWN: usize = 384;

/// What a photo is explained with.
struct Explainer<'a> {
    model: &'a Model,
    inside: Inside,
    method: Method,
    /// Of Grad-CAM.
    node: Option<NodeId>,
    layer: Option<&'a str>,
    head: Option<usize>,
    class: Option<usize>,
    max_pixels: u64,
}

pub fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let model = resolve(&global.request())?;
    global.report_weights(&model);
    let inside = Inside::new(&model, &global.device()?)?;
    let mut nodes = inside.graph().nodes().iter();
    let attends = nodes.any(|node| matches!(node.op, Op::SelfAttention { .. }));
    let method = arguments.method.unwrap_or(match attends {
        true => Method::Attention,
        false => Method::GradCam,
    });
    if method == Method::Attention && !attends {
        let model = model.name.clone();
        return Err(ExplainError::NoAttention { model }).context("--method attention");
    }
    if method == Method::GradCam && arguments.head.is_some() {
        anyhow::bail!("--head: Grad-CAM has no heads (take --method attention, or leave it out)");
    }
    let node = match (method, &arguments.layer) {
        (Method::Attention, _) => None,
        (_, Some(name)) => Some(inside.find(name).context("--layer")?),
        (_, None) => Some(last_map(&inside)?),
    };
    let class = match &arguments.class {
        None => None,
        Some(name) => {
            let found = match_classes(std::slice::from_ref(name), &model.labels);
            Some(found.context("--class")?[0])
        }
    };
    let explainer = Explainer {
        model: &model,
        inside,
        method,
        node,
        layer: arguments.layer.as_deref(),
        head: arguments.head,
        class,
        max_pixels: arguments.max_pixels,
    };
    let (mut plots, mut failed) = (Vec::new(), 0);
    let mut last = None;
    for input in Inputs::new(arguments.images.clone(), None) {
        if plots.len() == MOST_PHOTOS {
            global.note(&format!(
                "a sheet holds {MOST_PHOTOS} photos: the others are left out"
            ));
            break;
        }
        let explained = input
            .map_err(anyhow::Error::from)
            .and_then(|input| explainer.photo(Path::new(&input.name())));
        match explained {
            Ok((line, plot, map)) => {
                writeln!(global.stdout(), "{line}")?;
                plots.push(plot);
                last = Some(map);
            }
            // What is wrong with a flag is so for every photo.
            Err(error) if error.is::<ExplainError>() => return Err(error),
            Err(error) => {
                complain(&format!("{error:#}"));
                failed += 1;
            }
        }
    }
    if let (Some(path), Some(map)) = (&arguments.raw, last) {
        if plots.len() > 1 {
            anyhow::bail!("--raw: holds the map of one photo (name one)");
        }
        write_map(path, &map)?;
    }
    match &plots[..] {
        [] => {}
        [plot] => plot.write(&arguments.out)?,
        plots => contact_sheet(plots)?.write(&arguments.out)?,
    }
    if !plots.is_empty() {
        global.note(&format!("{}: written", arguments.out.display()));
    }
    Ok(Outcome::of(plots.len(), failed))
}

impl Explainer<'_> {
    /// A line to print, the picture, and the map.
    fn photo(&self, path: &Path) -> anyhow::Result<(String, Plot, Map)> {
        let photo = photo::read(path, self.max_pixels)?;
        let preprocessing = &self.model.preprocessing;
        let pixels = data::prepare(&photo, preprocessing);
        let (map, logits, how) = match self.node {
            Some(node) => {
                let found = grad_cam(&self.inside, &pixels, node, self.class)?;
                let name = &self.inside.graph().node(node).name;
                (found.map, found.logits, format!("Grad-CAM at {name}"))
            }
            None => self.attention(&pixels)?,
        };
        let ranking = Ranking {
            top_k: self.model.labels.len(),
            temperature: self.model.temperature,
            min_probability: 0.0,
        };
        let ranked = ranking.rank(&logits, &self.model.labels);
        let class = ranked
            .iter()
            .find(|r| self.class.is_none_or(|class| r.index == class))
            .context("the network names no class")?;
        let said = format!("{}  {:.1} %", class.label, 100.0 * class.probability);
        // What the network saw, in more detail.
        let scale = SHOWN.div_ceil(preprocessing.crop).max(1);
        let larger = Preprocessing {
            resize: preprocessing.resize * scale,
            crop: preprocessing.crop * scale,
            ..*preprocessing
        };
        let shown = data::crop_pixels(&photo, &larger);
        let name = path.file_name().unwrap_or(path.as_os_str());
        let overlay = Overlay {
            photo: &shown,
            side: larger.crop,
            map: &map,
            title: &said,
            below: &format!("{}: {how}, {}", name.to_string_lossy(), self.model.name),
        };
        let line = format!("{}  {said}", path.display());
        Ok((line, overlay.plot()?, map))
    }

    fn attention(&self, pixels: &[f32]) -> Result<(Map, Vec<f32>, String), ExplainError> {
        debug_assert_eq!(self.method, Method::Attention);
        let maps = attention_maps(&self.inside, pixels)?;
        let (map, how) = match (self.layer, self.head) {
            (None, None) => (maps.rollout()?, "attention rollout".to_string()),
            (layer, head) => {
                let head_name = head.map_or("all heads".into(), |head| format!("head {head}"));
                let place = layer.unwrap_or("the last layer");
                let how = format!("attention of {head_name} in {place}");
                (maps.layer(layer, head)?, how)
            }
        };
        Ok((map, maps.logits, how))
    }
}

fn write_map(path: &Path, map: &Map) -> anyhow::Result<()> {
    let tensor = Tensor::from_slice(&map.values, (map.height, map.width), &Device::Cpu)?;
    write_whole(path, |temporary| {
        tensor.write_npy(temporary).map_err(std::io::Error::other)
    })
    .with_context(|| path.display().to_string())
}
