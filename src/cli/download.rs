use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Mutex;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Global, Outcome, complain};
use crate::hub::{Hub, Progress, Repository};
use crate::models::registry;
use crate::models::{Pretrained, Source};
use crate::weights::{ModelError, cached, fetch, fetch_repository};

/// Fetch published weights, and print where they are
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sconce download resnet50 vit_b_16
  sconce download hub:timm/resnet18.a1_in1k
  sconce download hub:OWNER/NAME@REVISION
  sconce download https://download.pytorch.org/models/resnet18-f37072fd.pth
  sconce download --list                  what can be had, and what is here

Files of the hub go where Python's huggingface_hub keeps them (HF_HOME, HF_HUB_CACHE), others where
torch.hub does (TORCH_HOME). HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the variables for proxies are
heeded; SCONCE_TORCH_ENDPOINT names a mirror of download.pytorch.org/models. A download that was cut
goes on where it ended.")]
pub struct Arguments {
    /// Networks (NAME or NAME.TAG), hub repositories (hub:OWNER/NAME, hub:OWNER/NAME@REVISION),
    /// or addresses of files
    #[arg(value_name = "NAME", required_unless_present = "list")]
    names: Vec<String>,
    /// Keep files that are not the hub's below this folder instead of TORCH_HOME
    #[arg(long, value_name = "DIR")]
    torch_home: Option<PathBuf>,
    /// Show what can be had and what is here
    #[arg(long, conflicts_with = "names")]
    list: bool,
}

pub fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let hub = global.hub().torch_home(arguments.torch_home.clone());
    let mut out = global.stdout();
    if arguments.list {
        list(&hub, &mut out)?;
        return Ok(Outcome::AllDone);
    }
    let (mut done, mut failed) = (0, 0);
    for name in &arguments.names {
        match download(&hub, name) {
            Ok(path) => {
                done += 1;
                writeln!(out, "{}", path.display())?;
            }
            Err(error) => {
                failed += 1;
                complain(&format!("{error:#}"));
            }
        }
    }
    Ok(Outcome::of(done, failed))
}

fn download(hub: &Hub, name: &str) -> anyhow::Result<PathBuf> {
    if let Some(repository) = name.strip_prefix("hub:") {
        return Ok(fetch_repository(&Repository::parse(repository)?, hub)?);
    }
    if name.starts_with("https://") || name.starts_with("http://") {
        return Ok(hub.fetch_url(name)?);
    }
    let choice = registry::find(name).map_err(ModelError::Unknown)?;
    let Some(weights) = choice.weights else {
        return Err(ModelError::Unpublished { name: name.into() }.into());
    };
    Ok(fetch(weights, hub)?)
}

/// A row for each set of weights: name, where it is published, where it is here.
fn list(hub: &Hub, out: &mut impl Write) -> io::Result<()> {
    let rows: Vec<(String, String, String)> = registry::all()
        .iter()
        .flat_map(|row| row.weights.iter().map(move |w| (row, w)))
        .map(|(row, weights)| {
            let name = format!("{}.{}", row.name, weights.tag);
            (name, source(weights), place(weights, hub))
        })
        .collect();
    let widest =
        |length: fn(&(String, String, String)) -> usize| rows.iter().map(length).max().unwrap_or(0);
    let (names, sources) = (widest(|r| r.0.len()), widest(|r| r.1.len()));
    for (name, source, place) in &rows {
        writeln!(out, "{name:names$}  {source:sources$}  {place}")?;
    }
    Ok(())
}

fn source(weights: &Pretrained) -> String {
    match weights.source {
        Source::Torchvision { file, .. } => format!("torchvision:{file}"),
        Source::Hub { repo } => format!("hub:{repo}"),
    }
}

fn place(weights: &Pretrained, hub: &Hub) -> String {
    match cached(weights, hub) {
        Some(path) => path.display().to_string(),
        None if weights.is_embedded() => "in the program, rounded to float16".into(),
        None => "-".into(),
    }
}

/// A progress bar on the terminal; notes as lines.
pub struct Bar {
    quiet: bool,
    bar: Mutex<ProgressBar>,
}

impl Bar {
    pub fn new(quiet: bool) -> Self {
        Self {
            quiet,
            bar: Mutex::new(ProgressBar::hidden()),
        }
    }

    fn bar(&self) -> std::sync::MutexGuard<'_, ProgressBar> {
        self.bar.lock().unwrap_or_else(|e| e.into_inner())
    }
}

const KNOWN: &str =
    "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left";
const UNKNOWN: &str = "{msg} {spinner} {binary_bytes} {binary_bytes_per_sec}";

impl Progress for Bar {
    fn begin(&self, file: &str, _from: &str, size: Option<u64>, have: u64) {
        if self.quiet || !io::stderr().is_terminal() {
            return;
        }
        let (bar, template) = match size {
            Some(size) => (ProgressBar::new(size), KNOWN),
            None => (ProgressBar::new_spinner(), UNKNOWN),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(file.to_string());
        bar.set_position(have);
        // The rate is that of this run.
        bar.reset_eta();
        *self.bar() = bar;
    }

    fn position(&self, bytes: u64) {
        self.bar().set_position(bytes);
    }

    fn end(&self) {
        self.bar().finish_and_clear();
    }

    fn note(&self, text: &str) {
        if !self.quiet {
            self.bar().suspend(|| complain(text));
        }
    }
}
