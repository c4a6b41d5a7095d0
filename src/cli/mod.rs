//! The command line: a file for each subcommand, with its arguments and what it does. Nothing
//! else in the program knows clap, a terminal or a progress bar.

mod bench;
mod classify;
mod completions;
mod download;
mod embed;
mod evaluate;
mod explain;
mod export;
mod features;
mod finetune;
mod images;
mod kernels;
mod models;
mod photo;
mod together;

use std::io::{self, IsTerminal, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use anstream::{AutoStream, ColorChoice};
use candle_core::Device;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::exec::cpu::Options;
use crate::exec::{DeviceChoice, DeviceError, Precision, check_precision};
use crate::hub::Hub;
use crate::kernels::Isa;
use crate::ranks::{Ranks, local};
use crate::weights::{Model, Request, WeightsChoice};

/// Classify images, teach networks new classes, and look at them.
#[derive(Debug, Parser)]
#[command(
    name = "sconce",
    version,
    max_term_width = 100,
    after_help = "Examples:
  sconce classify photo.jpg               what is in this photo?
  sconce classify photos/ --format jsonl  every image below a folder, a line of JSON each
  sconce finetune flowers/                teach a network the folders' names
  sconce evaluate flowers/test/           how well does it name these?
  sconce models                           the networks, their size and accuracy
  sconce models resnet18                  one network, layer by layer
  sconce bench -m resnet18                how fast is it here?
  sconce explain photo.jpg                where in the photo did it see that?
  sconce embed photos/ -o photos.npy      a vector for each photo
  sconce features photo.jpg               what do its layers make of it?
  sconce kernels -m resnet18              what do its weights look like?
  sconce download resnet50                fetch weights before they are needed
  sconce export -m resnet18 --to onnx -o resnet18.onnx"
)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Classify(classify::Arguments),
    Finetune(Box<finetune::Arguments>),
    Evaluate(evaluate::Arguments),
    Models(models::Arguments),
    Embed(embed::Arguments),
    Features(features::Arguments),
    Kernels(kernels::Arguments),
    Explain(explain::Arguments),
    Bench(bench::Arguments),
    Download(download::Arguments),
    Export(export::Arguments),
    Completions(completions::Arguments),
}

/// Options of every subcommand.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Common options")]
struct Global {
    /// Network: a name (see `sconce models`), NAME.TAG for one of several weights, or a model file
    /// [default: mobilenet_v2]
    #[arg(short, long, global = true, value_name = "NAME|FILE")]
    model: Option<String>,
    /// Other weights for the network: a file of safetensors or PyTorch, or `none` for random ones
    #[arg(long, global = true, value_name = "FILE|none")]
    weights: Option<PathBuf>,
    /// Class names: one a line, or a JSON map from index to name
    #[arg(long, global = true, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Where to compute: auto, cpu, cuda, cuda:N or metal; finetune takes several, cuda:N,N
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Numbers that a CUDA device computes with [default: f32]
    #[arg(long, global = true, value_enum, value_name = "PRECISION")]
    precision: Option<Precision>,
    /// Threads [default: the cores that this process may use]
    #[arg(short = 'j', long, global = true, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Turn off every shortcut that changes digits
    #[arg(long, global = true)]
    exact: bool,
    /// Seed of everything random [default: 0]
    #[arg(long, global = true, value_name = "N")]
    seed: Option<u64>,
    /// No progress and no notes
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Say what is done
    #[arg(short, long, global = true)]
    verbose: bool,
    /// When to use colours (NO_COLOR is heeded too)
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t = Color::Auto)]
    color: Color,
    /// The processes that do this together.
    #[arg(skip)]
    ranks: Ranks,
    /// The device, once it is open: tensors of two openings do not mix.
    #[arg(skip)]
    opened: OnceLock<Device>,
}

/// The network that is part of the program.
const DEFAULT_MODEL: &str = "mobilenet_v2";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

/// `--format` of commands that print one report.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ReportFormat {
    Text,
    Json,
}

/// How a command ended that could do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    AllDone,
    /// Some inputs failed, the others were done.
    SomeFailed,
    /// Every input failed.
    NothingDone,
    /// Ended early as asked for, with everything saved.
    Interrupted,
}

impl Outcome {
    fn of(done: usize, failed: usize) -> Self {
        match (done, failed) {
            (_, 0) => Outcome::AllDone,
            (0, _) => Outcome::NothingDone,
            _ => Outcome::SomeFailed,
        }
    }

    /// The process's exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            Outcome::AllDone => 0,
            Outcome::SomeFailed => 1,
            Outcome::NothingDone => 2,
            Outcome::Interrupted => 130,
        }
    }
}

impl Cli {
    /// The processes that this one works with: those that a launcher has started, or one for each of
    /// several devices.
    ///
    /// # Errors
    /// Where they cannot meet.
    pub fn ranks(&self) -> anyhow::Result<Ranks> {
        let launched = Ranks::join().map_err(anyhow::Error::msg)?;
        if local::Place::found().is_none() {
            return Ok(launched);
        }
        let device = self.global.device()?;
        let others = Ranks::on_devices(&device).map_err(anyhow::Error::msg)?;
        Ok(others.unwrap_or(launched))
    }

    /// Does what was asked for, together with the other processes of `ranks`.
    ///
    /// # Errors
    /// Where nothing could be done.
    pub fn run(mut self, ranks: &Ranks) -> anyhow::Result<Outcome> {
        self.global.ranks = ranks.clone();
        // What the first one says is enough.
        self.global.quiet |= !ranks.is_first();
        self.global.verbose &= ranks.is_first();
        Isa::check_environment().map_err(anyhow::Error::msg)?;
        let together = matches!(
            self.command,
            Command::Finetune(_) | Command::Classify(_) | Command::Evaluate(_)
        );
        if ranks.are_several() && !together {
            anyhow::bail!("several processes only classify, evaluate and finetune together");
        }
        if let DeviceChoice::CudaEach(several) = &self.global.device
            && matches!(self.command, Command::Finetune(_))
            && local::Place::found().is_none()
        {
            if ranks.are_several() {
                anyhow::bail!(
                    "--device {}: a process that a launcher has started takes one device",
                    self.global.device
                );
            }
            #[cfg(feature = "cuda")]
            self.global.device.check_each()?;
            let code = Ranks::start_each(several.len());
            return Ok(match code.map_err(anyhow::Error::msg)? {
                0 => Outcome::AllDone,
                1 => Outcome::SomeFailed,
                130 => Outcome::Interrupted,
                _ => Outcome::NothingDone,
            });
        }
        match self.command {
            Command::Classify(arguments) => classify::run(&self.global, arguments),
            Command::Finetune(arguments) => finetune::run(&self.global, &arguments),
            Command::Evaluate(arguments) => evaluate::run(&self.global, &arguments),
            Command::Models(arguments) => models::run(&self.global, &arguments),
            Command::Embed(arguments) => embed::run(&self.global, &arguments),
            Command::Features(arguments) => features::run(&self.global, &arguments),
            Command::Kernels(arguments) => kernels::run(&self.global, &arguments),
            Command::Explain(arguments) => explain::run(&self.global, &arguments),
            Command::Bench(arguments) => bench::run(&self.global, &arguments),
            Command::Download(arguments) => download::run(&self.global, &arguments),
            Command::Export(arguments) => export::run(&self.global, &arguments),
            Command::Completions(arguments) => completions::run(&arguments),
        }
    }
}

impl Global {
    fn request(&self) -> Request {
        let weights = match &self.weights {
            None => WeightsChoice::Published,
            Some(path) if path.as_os_str() == "none" => WeightsChoice::None,
            Some(path) => WeightsChoice::File(path.clone()),
        };
        Request {
            model: self.model.as_deref().unwrap_or(DEFAULT_MODEL).to_string(),
            weights,
            labels: self.labels.clone(),
            seed: self.seed(),
            hub: self.hub(),
        }
    }

    /// The way to published files, with a progress bar.
    fn hub(&self) -> Hub {
        Hub::new().progress(Arc::new(download::Bar::new(self.quiet)))
    }

    fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }

    /// As asked for, else the cores that this process may use.
    fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        self.threads.map_or_else(cores, NonZeroUsize::get)
    }

    /// How networks are computed.
    fn plan_options(&self) -> Options {
        Options::threads(self.threads())
            .exact(self.exact)
            .precision(self.precision.unwrap_or_default())
    }

    /// Opens the device.
    fn device(&self) -> Result<Device, DeviceError> {
        if let Some(device) = self.opened.get() {
            return Ok(device.clone());
        }
        let device = self.device.open()?;
        check_precision(&device, self.precision.unwrap_or_default())?;
        Ok(self.opened.get_or_init(|| device).clone())
    }

    /// Standard output, with colours or without.
    fn stdout(&self) -> AutoStream<io::Stdout> {
        let choice = match self.color {
            Color::Auto => ColorChoice::Auto,
            Color::Always => ColorChoice::AlwaysAnsi,
            Color::Never => ColorChoice::Never,
        };
        AutoStream::new(io::stdout(), choice)
    }

    /// A line for people, but for those who want quiet.
    fn note(&self, text: &str) {
        if !self.quiet {
            complain(text);
        }
    }

    /// A note for those who asked for many.
    fn verbose(&self, note: impl FnOnce() -> String) {
        if self.verbose {
            complain(&note());
        }
    }

    /// How the weights met the network: by name for those who asked, else by count, and nothing
    /// where every tensor was used.
    fn report_weights(&self, model: &Model) {
        let Some(report) = model.report.as_ref().filter(|_| !self.quiet) else {
            return;
        };
        let from = model.weights_from().unwrap_or_default();
        let shapes = |(name, (wanted, held)): (&String, &(Vec<usize>, Vec<usize>))| {
            format!("{name} {held:?} for {wanted:?}")
        };
        let kinds = [
            (
                "not there, so random",
                report.missing.iter().cloned().collect(),
            ),
            (
                "of another shape, so random",
                report.mismatched.iter().map(shapes).collect(),
            ),
            ("not used", report.unexpected.iter().cloned().collect()),
        ];
        let kinds: [(&str, Vec<String>); 3] = kinds;
        self.verbose(|| format!("{from}: {} tensors loaded", report.loaded.len()));
        for (kind, names) in kinds.iter().filter(|(_, names)| !names.is_empty()) {
            let count = names.len();
            if self.verbose {
                complain(&format!(
                    "{from}: {count} tensors {kind}: {}",
                    names.join(", ")
                ));
            } else {
                complain(&format!("{from}: {count} tensors {kind} (-v names them)"));
            }
        }
    }

    /// Whether to draw progress: results themselves show it where they go to the terminal.
    fn shows_progress(&self) -> bool {
        !self.quiet && io::stderr().is_terminal() && !io::stdout().is_terminal()
    }
}

/// Images of more pixels are refused, unless more are asked for.
const MAX_PIXELS: u64 = 100_000_000;

/// What logits may be divided by.
fn temperature(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(t) if t > 0.0 && f64::is_finite(t) => Ok(t),
        _ => Err("expected a number above 0".into()),
    }
}

/// A line on standard error. Nobody is left to tell where that fails.
pub fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "sconce: {line}");
}
