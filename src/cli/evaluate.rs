use std::io::{self, IsTerminal};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use super::together::{self, Results};
use super::{Global, Outcome, ReportFormat, complain};
use crate::data::{
    self, Augmentation, Batch, BatchPlan, Cache, CacheLimit, Decoder, LabelledImages, Part, Sample,
    Skipped, fingerprint,
};
use crate::exec::Runner;
use crate::ranks::RANKS_DIFFER;
use crate::report::{Balance, Calibration, Judgement, Page, confusion_matrix, quoted, write_file};
use crate::train::{Evaluation, best_temperature};
use crate::weights::{Model, match_classes, resolve, set_temperature};

/// Say how well a network names labelled images
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sconce evaluate flowers/test/ -m runs/flowers/model.safetensors
  sconce evaluate imagenet/val/ -m resnet50 --format json
  sconce evaluate flowers/ -m runs/flowers/model.safetensors --split val --calibrate
  sconce evaluate photos.csv --mistakes mistakes.csv --report report.html

DATA takes the forms of finetune: a folder of class folders; one that holds train/, val/ or test/
with class folders each; a CSV with the columns path,label[,split]; mnist, fashion-mnist or cifar10,
each also :DIR for files on disk; or hub:OWNER/NAME.
Classes are named as the network names them, by ImageNet's WordNet ids (n02123045), or by index.")]
pub struct Arguments {
    /// Images and their classes
    #[arg(value_name = "DATA")]
    data: String,
    /// Which images: val where DATA are not divided is what finetune would validate on
    /// [default: val where DATA say which these are, else test, else all]
    #[arg(long, value_enum, value_name = "PART")]
    split: Option<Split>,
    /// Share of every class in val, where DATA do not say
    #[arg(long, value_name = "F", default_value = "0.2", value_parser = share)]
    val_split: f64,
    /// Find the temperature that makes probabilities fit best, and write it into the model file
    #[arg(long, conflicts_with = "temperature")]
    calibrate: bool,
    /// Divide logits by this before softmax, above 0 [default: the model's, else 1]
    #[arg(short = 'T', long, value_name = "T", value_parser = super::temperature)]
    temperature: Option<f64>,
    /// Write all mistakes as CSV, the worst first
    #[arg(long, value_name = "FILE.csv")]
    mistakes: Option<PathBuf>,
    /// Draw the confusion matrix
    #[arg(long, value_name = "FILE.png")]
    confusion: Option<PathBuf>,
    /// Write a page with all of it: matrix, classes, worst mistakes as pictures
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// How to print the result
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    format: ReportFormat,
    /// Images that go through the network together
    #[arg(short, long, value_name = "N", default_value = "8")]
    batch_size: NonZeroUsize,
    /// Put transparent images on this colour (white, #rgb, ...) instead of dropping transparency
    #[arg(long, value_name = "COLOR", value_parser = data::parse_color)]
    background: Option<[u8; 3]>,
    /// Refuse images of more pixels
    #[arg(long, value_name = "N", default_value_t = super::MAX_PIXELS)]
    max_pixels: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Split {
    Train,
    Val,
    Test,
    All,
}

impl From<Split> for Part {
    fn from(split: Split) -> Self {
        match split {
            Split::Train => Part::Train,
            Split::Val => Part::Validation,
            Split::Test => Part::Test,
            Split::All => Part::All,
        }
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if share > 0.0 && share < 1.0 => Ok(share),
        _ => Err("expected a number above 0, below 1".into()),
    }
}

pub fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let model = resolve(&global.request())?;
    let calibrated = match (&model.file, arguments.calibrate) {
        (Some(file), true) => Some(file.clone()),
        (None, true) => bail!(
            "--calibrate: {} has no model file to write the temperature into (make one: sconce export -m {0} --to safetensors -o FILE, then -m FILE)",
            model.name
        ),
        (_, false) => None,
    };
    let images = LabelledImages::open(
        &arguments.data,
        arguments.split.map(Part::from),
        arguments.val_split,
        global.seed(),
        &global.hub(),
    )?;
    let seen = fingerprint(&arguments.data, &images.classes, &[&images.samples]);
    if !global.ranks.agree(seen) {
        bail!("{}: {RANKS_DIFFER}", arguments.data);
    }
    let classes =
        match_classes(&images.classes, &model.labels).with_context(|| arguments.data.clone())?;
    let samples = images.samples.into_iter().map(|sample| Sample {
        label: classes[sample.label],
        ..sample
    });
    global.report_weights(&model);
    let device = global.device()?;
    let size = [model.preprocessing.crop; 2];
    let runner = model.runner(&device, size, global.plan_options())?;
    let samples: Arc<[Sample]> = samples.collect();
    images
        .notices
        .notes
        .iter()
        .for_each(|note| global.note(note));
    // All ranks look at the same folders.
    for place in images
        .notices
        .skipped
        .iter()
        .filter(|_| global.ranks.is_first())
    {
        complain(&format!("{}: {}", place.name.escape_debug(), place.reason));
    }
    let plan = BatchPlan {
        // Each is read once.
        cache: Cache::new(samples.len(), CacheLimit::default()),
        samples,
        decoder: Decoder {
            max_pixels: arguments.max_pixels,
            background: arguments.background,
            exact: global.exact,
        },
        preprocessing: model.preprocessing,
        augmentation: Augmentation::NONE,
        batch_size: arguments.batch_size.get(),
        seed: global.seed(),
        threads: global.threads(),
        parts: global.ranks.count(),
        part: global.ranks.rank(),
    };
    let temperature = arguments.temperature.unwrap_or(model.temperature);
    let Model { labels, name, .. } = model;
    let Measured {
        mut evaluation,
        logits,
        mut unreadable,
        ..
    } = measure(
        global,
        runner,
        &plan,
        labels.len(),
        temperature,
        calibrated.is_some(),
    )?;
    if !global.ranks.is_first() {
        return Ok(Outcome::AllDone);
    }
    unreadable += images.notices.skipped.len();
    global.verbose(|| {
        let seconds = started.elapsed().as_secs_f64();
        let rate = evaluation.images() as f64 / seconds;
        format!(
            "{} images in {seconds:.2} s, {rate:.1} images a second",
            evaluation.images()
        )
    });
    if evaluation.images() == 0 {
        return Ok(Outcome::NothingDone);
    }
    let calibration = match (&calibrated, &logits) {
        (Some(file), Some(logits)) => Some(calibrate(file, &mut evaluation, logits, temperature)?),
        _ => None,
    };
    let judgement = Judgement {
        evaluation: &evaluation,
        labels: &labels,
        samples: &plan.samples,
        unreadable,
        temperature: calibration.map_or(temperature, |c| c.temperature),
        calibration,
    };
    if let Some(path) = &arguments.mistakes {
        let mut csv = Vec::new();
        judgement.write_mistakes_csv(&mut csv)?;
        write_file(path, &csv)?;
    }
    if let Some(path) = &arguments.confusion {
        confusion_matrix(&evaluation, &labels)?.write(path)?;
    }
    if let Some(path) = &arguments.report {
        let seconds = started.elapsed().as_secs_f64();
        let page = page(global, arguments, &name, judgement, plan.decoder, seconds);
        write_file(path, page.html()?.as_bytes())?;
    }
    let mut stdout = global.stdout();
    match arguments.format {
        ReportFormat::Json => judgement.write_json(&mut stdout)?,
        ReportFormat::Text => judgement.write_text(&mut stdout)?,
    }
    Ok(Outcome::of(evaluation.images() as usize, unreadable))
}

/// What the network said.
struct Measured {
    evaluation: Evaluation,
    /// `[N, classes]`, where they were asked for.
    logits: Option<Vec<f32>>,
    unreadable: usize,
    bar: ProgressBar,
}

/// What became of a sample.
#[derive(Serialize, Deserialize)]
enum Answer {
    Logits {
        sample: usize,
        label: usize,
        #[serde(with = "together::bits")]
        logits: Vec<f32>,
    },
    Skipped(Skipped),
}

impl Results for Measured {
    type Answer = Answer;
    type Settled = Vec<Answer>;

    fn settle(&mut self, answers: Vec<Answer>) -> anyhow::Result<Vec<Answer>> {
        Ok(answers)
    }

    fn take(&mut self, answers: Vec<Answer>) -> anyhow::Result<()> {
        self.bar.inc(answers.len() as u64);
        for answer in answers {
            match answer {
                Answer::Logits {
                    sample,
                    label,
                    logits,
                } => {
                    self.evaluation.add(&logits, &[label], &[sample]);
                    if let Some(all) = &mut self.logits {
                        all.extend(logits);
                    }
                }
                Answer::Skipped(Skipped { name, reason }) => {
                    self.unreadable += 1;
                    let line = format!("{}: {reason}", name.escape_debug());
                    self.bar.suspend(|| complain(&line));
                }
            }
        }
        Ok(())
    }
}

/// Answers to the samples of a batch, in their order.
fn answers(batch: Batch, order: &Receiver<usize>, logits: &[f32], classes: usize) -> Vec<Answer> {
    let count = batch.labels.len() + batch.skipped.len();
    let read = batch.samples.into_iter().zip(batch.labels);
    let mut read = read.zip(logits.chunks_exact(classes)).peekable();
    let mut skipped = batch.skipped.into_iter();
    let answer = |sample: usize| match read.next_if(|((read, _), _)| *read == sample) {
        Some(((sample, label), logits)) => Some(Answer::Logits {
            sample,
            label,
            logits: logits.to_vec(),
        }),
        None => skipped.next().map(Answer::Skipped),
    };
    order.iter().take(count).filter_map(answer).collect()
}

/// Takes samples as they are named. Each batch's answers go to `write`.
fn evaluate(
    runner: &mut Runner,
    plan: &BatchPlan,
    samples: impl Iterator<Item = usize> + Send + 'static,
    classes: usize,
    write: &mut dyn FnMut(Vec<Answer>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (named, order) = mpsc::channel();
    let samples = samples.inspect(move |sample| {
        // It is gone where the process ends.
        let _ = named.send(*sample);
    });
    for batch in plan.as_named(samples).context("cannot start threads")? {
        let logits = match batch.labels.len() {
            0 => Vec::new(),
            count => runner.run(&batch.pixels, count)?,
        };
        write(answers(batch, &order, &logits, classes))?;
    }
    Ok(())
}

fn measure(
    global: &Global,
    mut runner: Runner,
    plan: &BatchPlan,
    classes: usize,
    temperature: f64,
    keep_logits: bool,
) -> anyhow::Result<Measured> {
    let mut measured = Measured {
        evaluation: Evaluation::new(classes, temperature),
        logits: keep_logits.then(Vec::new),
        unreadable: 0,
        bar: progress(global, plan.samples.len()),
    };
    let samples = 0..plan.samples.len();
    if global.ranks.are_several() {
        let own = plan.clone();
        let work = move |samples: Receiver<usize>, answer: &mut dyn FnMut(Answer)| {
            evaluate(
                &mut runner,
                &own,
                samples.into_iter(),
                classes,
                &mut |answers| {
                    answers.into_iter().for_each(&mut *answer);
                    Ok(())
                },
            )
        };
        together::share_out(&global.ranks, plan.batch_size, samples, work, &mut measured)?;
    } else {
        evaluate(&mut runner, plan, samples, classes, &mut |answers| {
            measured.take(answers)
        })?;
    }
    measured.bar.finish_and_clear();
    Ok(measured)
}

fn progress(global: &Global, images: usize) -> ProgressBar {
    if global.quiet || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = "{bar:24} {pos}/{len} images, {per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(images as u64).with_style(style)
}

/// Finds the best temperature, writes it into the model file, and counts anew with it.
fn calibrate(
    file: &Path,
    evaluation: &mut Evaluation,
    logits: &[f32],
    before: f64,
) -> anyhow::Result<Calibration> {
    let (labels, samples): (Vec<usize>, Vec<usize>) = evaluation
        .verdicts()
        .iter()
        .map(|v| (v.label as usize, v.sample as usize))
        .unzip();
    let Some(temperature) = best_temperature(logits, &labels) else {
        let why = if evaluation.accuracy() == 1.0 {
            "every image is named rightly, so that no temperature is the best (give images that are harder, or more of them)"
        } else {
            "no temperature from 0.01 to 100 is the best: the loss falls towards one end"
        };
        bail!("--calibrate: {why}; {} is as it was", file.display());
    };
    let classes = logits.len() / labels.len();
    let mut after = Evaluation::new(classes, temperature);
    after.add(logits, &labels, &samples);
    let calibration = Calibration {
        temperature_before: before,
        temperature,
        loss_before: evaluation.loss(),
        loss: after.loss(),
        calibration_error_before: evaluation.reliability().error(),
        calibration_error: after.reliability().error(),
    };
    set_temperature(file, temperature)
        .with_context(|| format!("--calibrate: {} is as it was", file.display()))?;
    *evaluation = after;
    Ok(calibration)
}

/// All that --report shows.
fn page<'a>(
    global: &Global,
    arguments: &Arguments,
    name: &str,
    judgement: Judgement<'a>,
    decoder: Decoder,
    seconds: f64,
) -> Page<'a> {
    let mut counts = vec![0; judgement.labels.len()];
    for sample in judgement.samples {
        counts[sample.label] += 1;
    }
    let model = global.model.as_deref().unwrap_or(super::DEFAULT_MODEL);
    let mut options = format!("-m {}", quoted(model));
    for (option, path) in [("--weights", &global.weights), ("--labels", &global.labels)] {
        if let Some(path) = path {
            options += &format!(" {option} {}", quoted(&path.display().to_string()));
        }
    }
    let data = &arguments.data;
    Page {
        title: format!("{name} on {data}"),
        subtitle: format!(
            "{} images of {} classes.",
            judgement.samples.len(),
            counts.iter().filter(|&&count| count > 0).count()
        ),
        judged: "images".into(),
        epochs: &[],
        epoch: None,
        balance: Balance::Judged(counts),
        seconds,
        settings: vec![
            ("data".into(), data.clone()),
            ("model".into(), model.to_string()),
            (
                "temperature".into(),
                format!("{:.4}", judgement.temperature),
            ),
            ("threads".into(), global.threads().to_string()),
            ("batch size".into(), arguments.batch_size.to_string()),
        ],
        commands: vec![format!("sconce classify {options} photo.jpg")],
        decoder,
        judgement,
    }
}
