//! The table of networks, and the layers of one.

use std::io::{self, Write};

use anstyle::Style;
use serde::Serialize;

use crate::graph::{Graph, GraphError};
use crate::models::registry::{self, DEFAULT_PREPROCESSING, IMAGENET_CLASSES};
use crate::models::{Pretrained, Source};

/// One network as `sconce models --format json` lists it.
#[derive(Clone, Debug, Serialize)]
pub struct ListedModel {
    pub name: &'static str,
    pub family: &'static str,
    pub parameters: usize,
    /// Multiply-adds for one image of the input size.
    pub macs: u64,
    /// Channels, height, width.
    pub input: [usize; 3],
    pub weights: Vec<ListedWeights>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ListedWeights {
    pub tag: &'static str,
    /// `embedded`, a URL's file, or a hub repository.
    pub source: String,
    /// Percent.
    pub top1: f32,
    /// Whether this machine has them.
    pub cached: bool,
}

/// Every network of the registry; `is_here` says of which weights this machine has.
///
/// # Errors
/// Where a network does not take images of its own input size.
pub fn list(is_here: impl Fn(&Pretrained) -> bool) -> Result<Vec<ListedModel>, GraphError> {
    let listed = registry::all().iter().map(|row| {
        let preprocessing = row.weights.first().map(|w| w.preprocessing);
        let crop = preprocessing.unwrap_or(DEFAULT_PREPROCESSING).crop;
        let total = row
            .architecture
            .graph(IMAGENET_CLASSES)
            .costs(crop, crop)?
            .total();
        let weights = row.weights.iter().map(|w| ListedWeights {
            tag: w.tag,
            source: match w.source {
                _ if w.is_embedded() => "embedded".into(),
                Source::Torchvision { file, .. } => format!("torchvision:{file}"),
                Source::Hub { repo } => format!("hub:{repo}"),
            },
            top1: w.top1,
            cached: is_here(w),
        });
        Ok(ListedModel {
            name: row.name,
            family: row.architecture.family(),
            parameters: total.parameters,
            macs: total.macs,
            input: [3, crop, crop],
            weights: weights.collect(),
        })
    });
    listed.collect()
}

/// Writes the table for people.
///
/// # Errors
/// Where `out` fails.
pub fn write_table(models: &[ListedModel], out: &mut impl Write) -> io::Result<()> {
    let (bold, dim) = (Style::new().bold(), Style::new().dimmed());
    let width = models.iter().map(|m| m.name.len()).max().unwrap_or(0);
    writeln!(
        out,
        "{bold}{:width$}  {:>10}  {:>8}  {:>5}  {:>6}  weights{bold:#}",
        "network", "parameters", "GMACs", "input", "top-1"
    )?;
    for model in models {
        let best = model
            .weights
            .iter()
            .map(|w| w.top1)
            .fold(None, |best, top1| {
                Some(best.map_or(top1, |b: f32| b.max(top1)))
            });
        let top1 = best.map_or("-".into(), |t| format!("{t:.1}"));
        let tags: Vec<String> = model
            .weights
            .iter()
            .map(|w| match w.source.as_str() {
                "embedded" => format!("{} (embedded)", w.tag),
                _ if w.cached => format!("{} (here)", w.tag),
                _ => w.tag.to_string(),
            })
            .collect();
        let tags = if tags.is_empty() {
            "none".into()
        } else {
            tags.join(", ")
        };
        writeln!(
            out,
            "{:width$}  {:>10}  {:>8.3}  {:>5}  {top1:>6}  {dim}{tags}{dim:#}",
            model.name,
            format!("{:.2} M", model.parameters as f64 / 1e6),
            model.macs as f64 / 1e9,
            model.input[1],
        )?;
    }
    Ok(())
}

/// One layer as `sconce models NAME --format json` lists it.
#[derive(Clone, Debug, Serialize)]
pub struct ListedLayer<'a> {
    pub name: &'a str,
    pub operation: String,
    /// `64 x 56 x 56`: channels, height, width; `197 x 768`: tokens, features; `1000`: features.
    pub output: String,
    pub parameters: usize,
    /// Multiply-adds for one image.
    pub macs: u64,
}

/// Every layer of a network, for images of `size` x `size`.
///
/// # Errors
/// Where the network does not take such images.
pub fn layers(graph: &Graph, size: usize) -> Result<Vec<ListedLayer<'_>>, GraphError> {
    let costs = graph.costs(size, size)?;
    let listed = graph.nodes().iter().zip(costs.nodes);
    let listed = listed.map(|(node, (shape, cost))| ListedLayer {
        name: &node.name,
        operation: node.op.label(),
        output: shape.to_string(),
        parameters: cost.parameters,
        macs: cost.macs,
    });
    Ok(listed.collect())
}

/// Writes a network layer by layer for people, with the sums last.
///
/// # Errors
/// Where `out` fails.
pub fn write_layers(
    name: &str,
    layers: &[ListedLayer],
    size: usize,
    out: &mut impl Write,
) -> io::Result<()> {
    let (bold, dim) = (Style::new().bold(), Style::new().dimmed());
    let longest = |length: fn(&ListedLayer) -> usize| layers.iter().map(length).max().unwrap_or(0);
    let names = longest(|l| l.name.len());
    let operations = longest(|l| l.operation.len());
    let outputs = longest(|l| l.output.len()).max("output".len());
    writeln!(out, "{bold}{name}{bold:#}, an image of {size} x {size}\n")?;
    writeln!(
        out,
        "{bold}{:names$}  {:operations$}  {:>outputs$}  {:>11}  {:>10}{bold:#}",
        "layer", "operation", "output", "parameters", "MMACs"
    )?;
    for layer in layers {
        let parameters = some(layer.parameters > 0, || layer.parameters.to_string());
        let macs = some(layer.macs > 0, || millions(layer.macs));
        writeln!(
            out,
            "{:names$}  {dim}{:operations$}{dim:#}  {:>outputs$}  {parameters:>11}  {macs:>10}",
            layer.name, layer.operation, layer.output
        )?;
    }
    let parameters: usize = layers.iter().map(|l| l.parameters).sum();
    let macs = millions(layers.iter().map(|l| l.macs).sum());
    writeln!(
        out,
        "\n{bold}{parameters}{bold:#} parameters, {bold}{macs}{bold:#} million multiply-adds"
    )
}

fn some(shown: bool, text: impl FnOnce() -> String) -> String {
    if shown { text() } else { String::new() }
}

fn millions(count: u64) -> String {
    format!("{:.3}", count as f64 / 1e6)
}
