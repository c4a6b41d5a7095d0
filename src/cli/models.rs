use std::io::Write;

use clap::Args;

use super::{Global, Outcome, ReportFormat};
use crate::models::registry::{self, IMAGENET_CLASSES};
use crate::report;
use crate::weights::{ModelError, cached};

/// List the networks, or show one layer by layer
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sconce models
  sconce models mobilenet_v2
  sconce models --format json | jq -r '.[] | select(.macs < 4e8) | .name'")]
pub struct Arguments {
    /// Show this network's layers with shapes and costs
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// How to print
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    format: ReportFormat,
}

pub fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let mut out = global.stdout();
    if let Some(name) = &arguments.name {
        let choice = registry::find(name).map_err(ModelError::Unknown)?;
        let graph = choice.row.architecture.graph(IMAGENET_CLASSES);
        let size = choice.preprocessing().crop;
        let layers = report::layers(&graph, size)?;
        match arguments.format {
            ReportFormat::Text => report::write_layers(choice.row.name, &layers, size, &mut out)?,
            ReportFormat::Json => writeln!(out, "{}", serde_json::to_string_pretty(&layers)?)?,
        }
    } else {
        let hub = global.hub();
        let models = report::list(|w| w.is_embedded() || cached(w, &hub).is_some())?;
        match arguments.format {
            ReportFormat::Text => report::write_table(&models, &mut out)?,
            ReportFormat::Json => writeln!(out, "{}", serde_json::to_string_pretty(&models)?)?,
        }
    }
    Ok(Outcome::AllDone)
}
