use std::io::{self, BufWriter, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use super::images::Images;
use super::together::{self, Results};
use super::{Global, Outcome, complain};
use crate::data::{Decoder, Found, Loaded, Loader, Next, Prepared, Sorting, mirror, sort_into};
use crate::exec::Runner;
use crate::report::{
    self, Earlier, INDEX_FILE, Index, IndexEntry, Prediction, Ranking, Record, Shard, Writer,
};
use crate::weights::{Model, resolve};

/// Say what is in images
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sconce classify photo.jpg
  sconce classify photos/ 'more/*.png' --top-k 1
  sconce classify photos/ --format jsonl > labels.jsonl
  find . -name '*.jpg' -print0 | sconce classify --files-from - -0 --format csv
  curl -s https://example.org/cat.jpg | sconce classify -
  sconce classify photos/ --format jsonl --resume-from labels.jsonl >> labels.jsonl
  sconce classify photos/ --sort-into sorted/ --min-probability 0.5
  sconce classify -m resnet50 --weights resnet50.safetensors photo.jpg")]
pub struct Arguments {
    #[command(flatten)]
    images: Images,
    /// How many classes to name
    #[arg(short = 'k', long, value_name = "N", default_value = "5")]
    top_k: NonZeroUsize,
    /// Divide logits by this before softmax, above 0 [default: the model's, else 1]
    #[arg(short = 'T', long, value_name = "T", value_parser = super::temperature)]
    temperature: Option<f64>,
    /// Images that go through the network together
    #[arg(short, long, value_name = "N", default_value = "8")]
    batch_size: NonZeroUsize,
    /// How to print results
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Print all logits too, in class order, before temperature
    #[arg(long)]
    logits: bool,
    /// Leave out classes that are less probable
    #[arg(long, value_name = "P", default_value = "0", value_parser = probability)]
    min_probability: f64,
    /// Average the logits of each image and its mirror image
    #[arg(long)]
    tta: bool,
    /// Link each image into a folder of DIR that is named after its label (`unsure` where no class is
    /// as probable as --min-probability)
    #[arg(long, value_name = "DIR")]
    sort_into: Option<PathBuf>,
    /// Copy images instead
    #[arg(long, requires = "sort_into")]
    copy: bool,
    /// Move images instead
    #[arg(long = "move", requires = "sort_into", conflicts_with = "copy")]
    move_: bool,
    /// Go on with images as they arrive in the folders or change there, each once it is whole, until
    /// stopped or the folders are gone
    #[arg(long, conflicts_with = "files_from")]
    watch: bool,
    /// Leave out images whose results are in this file (or folder, see --shards) of an earlier run, to
    /// which those of this one may be appended
    #[arg(long, value_name = "RESULTS.jsonl")]
    resume_from: Option<PathBuf>,
    /// Write results into a folder, as JSON lines: a file for each process (see the README on several
    /// machines), and index.jsonl, which tells their order
    #[arg(long, value_name = "DIR", conflicts_with = "format")]
    shards: Option<PathBuf>,
}

/// Where images go of which nothing is said.
const UNSURE: &str = "unsure";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
    Jsonl,
    Csv,
}

impl From<Format> for report::Format {
    fn from(format: Format) -> Self {
        match format {
            Format::Text => report::Format::Text,
            Format::Json => report::Format::Json,
            Format::Jsonl => report::Format::JsonLines,
            Format::Csv => report::Format::Csv,
        }
    }
}

fn probability(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(p) if (0.0..=1.0).contains(&p) => Ok(p),
        _ => Err("expected a number from 0 to 1".into()),
    }
}

/// A batch that is not full waits so long for one more image.
const PATIENCE: Duration = Duration::from_millis(20);

pub fn run(global: &Global, arguments: Arguments) -> anyhow::Result<Outcome> {
    let inputs: Box<dyn Iterator<Item = Found> + Send> = if arguments.watch {
        if arguments.format == Format::Json {
            anyhow::bail!("--watch: an array of JSON has an end (choose --format jsonl)");
        }
        Box::new(arguments.images.watch(arguments.sort_into.as_deref())?)
    } else {
        Box::new(arguments.images.open("classify")?)
    };
    let earlier_at = arguments.resume_from.as_deref();
    let earlier = earlier_at
        .map(Earlier::read)
        .transpose()
        .context("--resume-from")?;
    if let Some(earlier) = &earlier {
        let count = earlier.len();
        global.note(&format!("{count} results are there already"));
        let appends = arguments.format == Format::Jsonl && arguments.shards.is_none();
        if earlier.is_cut() && appends && global.ranks.is_first() {
            // What is appended must not become part of the line that was cut off.
            writeln!(global.stdout())?;
        }
    }
    let shards = arguments.shards.as_deref();
    let shards = shards
        .map(|folder| Shards::begin(global, folder, earlier_at))
        .transpose()
        .context("--shards")?;
    let started = Instant::now();
    let model = resolve(&global.request())?;
    global.report_weights(&model);
    let device = global.device()?;
    // Decoding begins while the network is made ready.
    let inputs = inputs.filter(move |found| {
        let name = match found {
            Ok(input) => &input.name(),
            Err(error) => &error.name,
        };
        !earlier.as_ref().is_some_and(|earlier| earlier.has(name))
    });
    let engine = Engine {
        decoder: arguments.images.decoder(global.exact),
        threads: global.threads(),
        batch_size: arguments.batch_size.get(),
        tta: arguments.tta,
    };
    let size = [model.preprocessing.crop; 2];
    let options = global.plan_options();
    let out: Box<dyn Write> = match &shards {
        Some(shards) => Box::new(BufWriter::new(shards.own.writer()?)),
        None if global.ranks.is_first() => Box::new(global.stdout().lock()),
        None => Box::new(io::sink()),
    };
    let format = match &shards {
        Some(_) => report::Format::JsonLines,
        None => arguments.format.into(),
    };
    let mut output = Output {
        ranking: Ranking {
            top_k: arguments.top_k.get(),
            temperature: arguments.temperature.unwrap_or(model.temperature),
            min_probability: arguments.min_probability,
        },
        labels: model.labels.clone(),
        writer: Writer::new(out, format)?,
        shards,
        progress: progress(global.shows_progress()),
        logits: arguments.logits,
        sorting: arguments.sort_into.map(|folder| {
            let sorting = match (arguments.copy, arguments.move_) {
                (true, _) => Sorting::Copy,
                (_, true) => Sorting::Move,
                _ => Sorting::Link,
            };
            (folder, sorting)
        }),
        done: 0,
        failed: 0,
    };
    if global.ranks.are_several() {
        let batch_size = engine.batch_size;
        let work = move |inputs: Receiver<Found>, answer: &mut dyn FnMut(Answer)| {
            let loader = engine.load(inputs.into_iter(), &model)?;
            let mut runner = model.runner(&device, size, options)?;
            engine.classify(&loader, &model, &mut runner, &mut |answers| {
                answers.into_iter().for_each(&mut *answer);
                Ok(())
            })
        };
        together::share_out(&global.ranks, batch_size, inputs, work, &mut output)?;
    } else {
        let loader = engine.load(inputs, &model)?;
        let mut runner = model.runner(&device, size, options)?;
        global.verbose(|| {
            let weights = model.weights_from().unwrap_or("none (random)");
            format!(
                "{}: weights {weights}, {} threads, ready in {:.0} ms",
                model.name,
                global.threads(),
                started.elapsed().as_secs_f64() * 1e3
            )
        });
        engine.classify(&loader, &model, &mut runner, &mut |answers| {
            let settled = output.settle(answers)?;
            output.take(settled)
        })?;
    }
    if !global.ranks.is_first() {
        return Ok(Outcome::AllDone);
    }
    output.progress.finish_and_clear();
    output.writer.finish()?;
    if let Some(folder) = &arguments.shards {
        let index = folder.join(INDEX_FILE);
        let count = output.done + output.failed;
        global.note(&format!(
            "{count} results, in the order of {}",
            index.display()
        ));
    }
    global.verbose(|| {
        let seconds = started.elapsed().as_secs_f64();
        let rate = output.done as f64 / seconds;
        format!(
            "{} done in {seconds:.2} s, {rate:.1} images a second",
            output.done
        )
    });
    Ok(Outcome::of(output.done, output.failed))
}

fn progress(shown: bool) -> ProgressBar {
    if !shown {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {pos} images, {per_sec}, {elapsed}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::no_length().with_style(style)
}

/// What the network says of an image.
#[derive(Serialize, Deserialize)]
struct Scored {
    width: usize,
    height: usize,
    /// Told to other processes bit by bit.
    #[serde(with = "together::bits")]
    logits: Vec<f32>,
}

/// An image's name, and the same or why it could not be read.
type Answer = (String, Result<Scored, String>);

/// How images become logits.
struct Engine {
    decoder: Decoder,
    threads: usize,
    batch_size: usize,
    tta: bool,
}

impl Engine {
    /// Decoding begins while the network is made ready.
    fn load(
        &self,
        inputs: impl Iterator<Item = Found> + Send + 'static,
        model: &Model,
    ) -> anyhow::Result<Loader> {
        Loader::start(inputs, self.decoder, model.preprocessing, self.threads)
            .context("cannot start threads")
    }

    /// Takes images as they come, and hands a batch on when it is full or nothing more comes. Each
    /// batch's answers go to `write`.
    fn classify(
        &self,
        loader: &Loader,
        model: &Model,
        runner: &mut Runner,
        write: &mut dyn FnMut(Vec<Answer>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut pending: Vec<Loaded> = Vec::new();
        let mut batch = |pending: &mut Vec<Loaded>| -> anyhow::Result<()> {
            let images: Vec<&Prepared> = pending
                .iter()
                .filter_map(|l| l.result.as_ref().ok())
                .collect();
            let logits = self.logits(&images, model, runner)?;
            let mut logits = logits.chunks_exact(model.labels.len());
            let answer = |Loaded { name, result }: Loaded| {
                let scored = result.map(|image| Scored {
                    width: image.width,
                    height: image.height,
                    logits: logits.next().unwrap_or_default().to_vec(),
                });
                (name, scored)
            };
            write(pending.drain(..).map(answer).collect())
        };
        loop {
            let wait = (!pending.is_empty()).then_some(PATIENCE);
            match loader.next(wait) {
                Next::Item(image) => pending.push(image),
                Next::Waiting => batch(&mut pending)?,
                Next::End => return batch(&mut pending),
            }
            if pending.len() == self.batch_size {
                batch(&mut pending)?;
            }
        }
    }

    /// Logits of all images, one after the other.
    fn logits(
        &self,
        images: &[&Prepared],
        model: &Model,
        runner: &mut Runner,
    ) -> anyhow::Result<Vec<f32>> {
        if images.is_empty() {
            return Ok(Vec::new());
        }
        let pixels: Vec<&[f32]> = images.iter().map(|i| i.pixels.as_slice()).collect();
        let batch = pixels.concat();
        let mut logits = runner.run(&batch, images.len())?;
        if self.tta {
            let crop = model.preprocessing.crop;
            let mirrored: Vec<f32> = images
                .iter()
                .flat_map(|i| mirror(&i.pixels, crop))
                .collect();
            let others = runner.run(&mirrored, images.len())?;
            for (logit, other) in logits.iter_mut().zip(others) {
                *logit = (*logit + other) / 2.0;
            }
        }
        Ok(logits)
    }
}

/// Where results go.
struct Output<W: io::Write> {
    labels: Vec<String>,
    ranking: Ranking,
    writer: Writer<W>,
    shards: Option<Shards>,
    progress: ProgressBar,
    logits: bool,
    sorting: Option<(PathBuf, Sorting)>,
    done: usize,
    failed: usize,
}

/// Files of results, each process's own (--shards).
struct Shards {
    own: Shard,
    /// The first process's to write.
    index: Option<Index>,
}

impl Shards {
    /// Goes on where the results of an earlier run are in the same folder.
    fn begin(global: &Global, folder: &Path, earlier: Option<&Path>) -> anyhow::Result<Self> {
        let goes_on = earlier.is_some_and(|earlier| same_folder(earlier, folder));
        let ranks = &global.ranks;
        let index = ranks.is_first().then(|| Index::begin(folder, goes_on));
        let index = index.transpose()?;
        // The others append to files that are whole.
        ranks.any(false);
        Ok(Self {
            own: Shard::open(folder, ranks.rank())?,
            index,
        })
    }
}

fn same_folder(one: &Path, other: &Path) -> bool {
    match (one.canonicalize(), other.canonicalize()) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

/// What the first process is told of images.
#[derive(Serialize, Deserialize)]
enum Settled {
    Answers(Vec<Answer>),
    /// Their results are in a file already.
    Written {
        entry: IndexEntry,
        failed: usize,
    },
}

impl<W: io::Write> Results for Output<W> {
    type Answer = Answer;
    type Settled = Settled;

    fn settle(&mut self, answers: Vec<Answer>) -> anyhow::Result<Settled> {
        // Taken out while it writes.
        let Some(mut shards) = self.shards.take() else {
            return Ok(Settled::Answers(answers));
        };
        let count = answers.len() as u64;
        let failed = self.write_all(answers)?;
        let entry = shards.own.entry(count)?;
        self.shards = Some(shards);
        Ok(Settled::Written { entry, failed })
    }

    fn take(&mut self, settled: Settled) -> anyhow::Result<()> {
        let (count, failed) = match settled {
            Settled::Answers(answers) => (answers.len(), self.write_all(answers)?),
            Settled::Written { entry, failed } => {
                if let Some(index) = self.shards.as_mut().and_then(|s| s.index.as_mut()) {
                    index.add(&entry)?;
                }
                (entry.results as usize, failed)
            }
        };
        self.done += count - failed;
        self.failed += failed;
        self.progress.inc(count as u64);
        Ok(())
    }
}

impl<W: io::Write> Output<W> {
    /// Writes results, in their order. How many are of images that failed.
    fn write_all(&mut self, answers: Vec<Answer>) -> anyhow::Result<usize> {
        let mut failed = 0;
        for (name, answer) in answers {
            let result = answer.and_then(|scored| {
                let prediction = Prediction {
                    width: scored.width,
                    height: scored.height,
                    top: self.ranking.rank(&scored.logits, &self.labels),
                    logits: self.logits.then_some(scored.logits),
                };
                self.sort(&name, &prediction)?;
                Ok(prediction)
            });
            if let Err(error) = &result {
                failed += 1;
                let line = format!("{}: {error}", name.escape_debug());
                self.progress.suspend(|| complain(&line));
            }
            self.writer.write(&Record::new(name, result))?;
        }
        Ok(failed)
    }

    /// Puts an image into the folder of its label, where that is wanted.
    fn sort(&self, name: &str, prediction: &Prediction) -> Result<(), String> {
        let Some((folder, sorting)) = &self.sorting else {
            return Ok(());
        };
        if name == "-" {
            return Err("standard input cannot be sorted (name a file)".into());
        }
        let label = prediction.top.first().map_or(UNSURE, |top| &top.label);
        sort_into(folder, label, Path::new(name), *sorting)
            .map(|_| ())
            .map_err(|error| format!("cannot be sorted into {}: {error}", folder.display()))
    }
}
