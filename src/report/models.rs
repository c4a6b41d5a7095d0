//! The table of networks, and the layers of one.

use std::io::{self, Write};

use anstyle::Style;
use serde::Serialize;

use crate::graph::{Graph, GraphError};
use crate::models::Source;
use crate::models::registry::{self, DEFAULT_PREPROCESSING};

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

/// Classes of ImageNet-1k: what published sizes are counted with.
const CLASSES: usize = 1000;

/// Every network of the registry.
///
/// # Errors
/// Where a network does not take images of its own input size.
pub fn list() -> Result<Vec<ListedModel>, GraphError> {
    let listed = registry::all().iter().map(|row| {
        let preprocessing = row.weights.first().map(|w| w.preprocessing);
        let crop = preprocessing.unwrap_or(DEFAULT_PREPROCESSING).crop;
        let total = row.architecture.graph(CLASSES).costs(crop, crop)?.total();
        let weights = row.weights.iter().map(|w| ListedWeights {
            tag: w.tag,
            source: match w.source {
                _ if w.is_embedded() => "embedded".into(),
                Source::Torchvision { file, .. } => format!("torchvision:{file}"),
                Source::Hub { repo } => format!("hub:{repo}"),
            },
            top1: w.top1,
            cached: w.is_embedded(),
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
            millions(model.parameters),
            model.macs as f64 / 1e9,
            model.input[1],
        )?;
    }
    Ok(())
}

/// Writes a network layer by layer: name, operation, output shape, parameters, multiply-adds.
///
/// # Errors
/// Where `out` fails, or the network does not take images of that size.
pub fn write_layers(
    name: &str,
    graph: &Graph,
    size: usize,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let costs = graph.costs(size, size)?;
    let (bold, dim) = (Style::new().bold(), Style::new().dimmed());
    let labels: Vec<String> = graph.nodes().iter().map(|n| n.op.label()).collect();
    let shapes: Vec<String> = costs.nodes.iter().map(|(s, _)| s.to_string()).collect();
    let longest = |texts: &mut dyn Iterator<Item = usize>| texts.max().unwrap_or(0);
    let names = longest(&mut graph.nodes().iter().map(|n| n.name.len()));
    let operations = longest(&mut labels.iter().map(String::len));
    let outputs = longest(&mut shapes.iter().map(String::len)).max("output".len());
    writeln!(out, "{bold}{name}{bold:#}, an image of {size} x {size}\n")?;
    writeln!(
        out,
        "{bold}{:names$}  {:operations$}  {:>outputs$}  {:>11}  {:>10}{bold:#}",
        "layer", "operation", "output", "parameters", "MMACs"
    )?;
    let nodes = graph.nodes().iter().zip(&labels).zip(&shapes);
    for (((node, label), shape), (_, cost)) in nodes.zip(&costs.nodes) {
        let parameters = some(cost.parameters > 0, || cost.parameters.to_string());
        let macs = some(cost.macs > 0, || format!("{:.3}", cost.macs as f64 / 1e6));
        writeln!(
            out,
            "{:names$}  {dim}{label:operations$}{dim:#}  {shape:>outputs$}  {parameters:>11}  {macs:>10}",
            node.name,
        )?;
    }
    let total = costs.total();
    writeln!(
        out,
        "\n{bold}{}{bold:#} parameters, {bold}{:.3}{bold:#} million multiply-adds",
        total.parameters,
        total.macs as f64 / 1e6
    )?;
    Ok(())
}

fn some(shown: bool, text: impl FnOnce() -> String) -> String {
    if shown { text() } else { String::new() }
}

fn millions(count: usize) -> String {
    format!("{:.2} M", count as f64 / 1e6)
}
