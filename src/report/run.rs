//! What a training run leaves for people to look at, kept up to date in its folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::page::{Balance, Epoch, Page};
use super::plot::confusion_matrix;
use super::tensorboard::{self, EventFile, Setting, Step};
use super::{Judgement, ReportError, quoted, write_file};
use crate::data::{Decoder, Sample};
use crate::train::{EpochReport, Evaluation, METRICS_FILE, MODEL_FILE, Run, Settings};

/// The page of a run.
pub const REPORT_FILE: &str = "report.html";
/// The confusion matrix of a run's best epoch.
pub const CONFUSION_FILE: &str = "confusion_matrix.png";

/// Writes `report.html`, `confusion_matrix.png` and TensorBoard's events as a run goes on.
pub struct RunReport {
    out: PathBuf,
    name: String,
    settings: Settings,
    labels: Vec<String>,
    samples: Vec<Sample>,
    counts: [Vec<usize>; 2],
    events: Option<EventFile>,
    /// The last epoch that TensorBoard has been told of, once it is known whether there is one.
    told: Option<Option<u64>>,
    /// What the page is about: the best epoch that this process saw, else the last.
    shown: Option<Shown>,
    /// When this process began, and what earlier ones took; that is known with the first epoch.
    began: Instant,
    seconds_before: Option<f64>,
    /// When the page was last written, and how long that took.
    written: Option<(Instant, Duration)>,
}

struct Shown {
    epoch: u64,
    best: bool,
    evaluation: Evaluation,
}

/// The page, and the pictures for TensorBoard, take at most this part of a run, but for the page at
/// the end: a head trains in epochs that are shorter than a page is written.
const SHARE: u32 = 20;

impl RunReport {
    pub fn new(run: &Run) -> Self {
        let count = |samples: &[Sample]| {
            let mut counts = vec![0; run.dataset.classes.len()];
            samples.iter().for_each(|sample| counts[sample.label] += 1);
            counts
        };
        Self {
            out: run.out.clone(),
            name: run.model.name.clone(),
            settings: run.settings.clone(),
            labels: run.dataset.classes.clone(),
            samples: run.dataset.validation.clone(),
            counts: [count(&run.dataset.train), count(&run.dataset.validation)],
            events: None,
            told: None,
            shown: None,
            began: Instant::now(),
            seconds_before: None,
            written: None,
        }
    }

    /// Takes note of an epoch that is done and in metrics.jsonl.
    ///
    /// # Errors
    /// Where a file cannot be written; training need not end for that.
    pub fn epoch(
        &mut self,
        report: &EpochReport,
        evaluation: &Evaluation,
    ) -> Result<(), ReportError> {
        if report.is_best || self.shown.as_ref().is_none_or(|shown| !shown.best) {
            self.shown = Some(Shown {
                epoch: report.epoch,
                best: report.is_best,
                evaluation: evaluation.clone(),
            });
        }
        let epochs = self.epochs()?;
        self.seconds_before.get_or_insert_with(|| {
            let before = epochs.iter().filter(|e| e.epoch < report.epoch);
            before.filter_map(|e| e.seconds).sum()
        });
        let due = self
            .written
            .is_none_or(|(when, took)| when.elapsed() >= took * SHARE);
        let began = Instant::now();
        self.add_events(&epochs, due.then_some(evaluation))?;
        if due {
            self.write(&epochs)?;
            self.written = Some((Instant::now(), began.elapsed()));
        }
        Ok(())
    }

    /// Brings everything up to date: the run is through, or interrupted.
    ///
    /// # Errors
    /// As [`RunReport::epoch`].
    pub fn finish(&mut self, through: bool) -> Result<(), ReportError> {
        let epochs = self.epochs()?;
        self.add_events(&epochs, None)?;
        if self.shown.is_some() {
            self.write(&epochs)?;
        }
        if through && let (Some(events), Some(last)) = (&mut self.events, epochs.last()) {
            let added = events.add(last.epoch, Step::default().end());
            added.map_err(|e| ReportError::io(&self.out, e))?;
        }
        Ok(())
    }

    /// The lines of metrics.jsonl.
    fn epochs(&self) -> Result<Vec<Epoch>, ReportError> {
        let path = self.out.join(METRICS_FILE);
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            text => text.map_err(|e| ReportError::io(&path, e))?,
        };
        let lines = text.lines().map(serde_json::from_str);
        Ok(lines.filter_map(Result::ok).collect())
    }

    fn write(&self, epochs: &[Epoch]) -> Result<(), ReportError> {
        let Some(shown) = &self.shown else {
            return Ok(());
        };
        let plot = confusion_matrix(&shown.evaluation, &self.labels)?;
        plot.write(&self.out.join(CONFUSION_FILE))?;
        let html = self.page(shown, epochs).html()?;
        write_file(&self.out.join(REPORT_FILE), html.as_bytes())
    }

    fn page<'a>(&'a self, shown: &'a Shown, epochs: &'a [Epoch]) -> Page<'a> {
        let [train, validation] = &self.counts;
        let before = self.seconds_before.unwrap_or(0.0);
        let seconds = before + self.began.elapsed().as_secs_f64();
        let model = quoted(&self.out.join(MODEL_FILE).display().to_string());
        let data = &self.settings.data;
        let total = |counts: &[usize]| counts.iter().sum::<usize>();
        let planned = self.settings.epochs;
        let done = epochs.last().map_or(0, |e| e.epoch);
        Page {
            title: format!("{}: {}", stem(data), self.name),
            subtitle: format!(
                "Fine-tuned on {data}: {} classes, {} images to train on, {} to validate; {done} of {planned} epochs. Figures are of {} {}, on the images to validate on.",
                self.labels.len(),
                total(train),
                total(validation),
                if shown.best {
                    "the best epoch,"
                } else {
                    "epoch"
                },
                shown.epoch,
            ),
            judgement: Judgement {
                evaluation: &shown.evaluation,
                labels: &self.labels,
                samples: &self.samples,
                unreadable: self.samples.len() - shown.evaluation.images() as usize,
                temperature: 1.0,
                calibration: None,
            },
            judged: "validation images".into(),
            epochs,
            epoch: Some(shown.epoch),
            balance: Balance::Divided {
                train: train.clone(),
                validation: validation.clone(),
            },
            seconds,
            settings: pairs(&self.settings)
                .into_iter()
                .map(|(name, setting)| (name.replace('_', " "), shown_setting(&setting)))
                .collect(),
            commands: vec![
                format!("sconce classify -m {model} photo.jpg"),
                format!(
                    "sconce evaluate {} --split val{} -m {model}",
                    quoted(data),
                    self.split_options()
                ),
            ],
            decoder: Decoder {
                max_pixels: self.settings.max_pixels,
                background: None,
                exact: self.settings.exact,
            },
        }
    }

    /// What tells evaluate which images were kept to validate on.
    fn split_options(&self) -> String {
        let Settings {
            val_split, seed, ..
        } = self.settings;
        let mut options = String::new();
        if val_split != 0.2 {
            options += &format!(" --val-split {val_split}");
        }
        if seed != 0 {
            options += &format!(" --seed {seed}");
        }
        options
    }

    /// Adds what TensorBoard has not been told: the numbers of every epoch, those included that a
    /// process ended before it could tell, and what `evaluation` says of the last one besides.
    fn add_events(
        &mut self,
        epochs: &[Epoch],
        evaluation: Option<&Evaluation>,
    ) -> Result<(), ReportError> {
        let told = tensorboard::last_step(&self.out);
        let told = self.told.get_or_insert(told);
        let from = epochs.partition_point(|e| told.is_some_and(|told| e.epoch <= told));
        for (index, epoch) in epochs.iter().enumerate().skip(from) {
            let mut step = Step::default();
            if told.is_none() {
                // Beside the first numbers, so that either are there or neither.
                let metrics = ["accuracy/val", "loss/val"];
                step = step.settings(&pairs(&self.settings), &metrics);
            }
            for (tag, value) in scalars(epoch) {
                if let Some(value) = value {
                    step = step.scalar(tag, value);
                }
            }
            if let Some(evaluation) = evaluation.filter(|_| index + 1 == epochs.len()) {
                let verdicts = evaluation.verdicts().iter();
                let named = verdicts.clone().map(|v| f64::from(v.named_probability));
                let truth = verdicts.map(|v| f64::from(v.label_probability));
                let recall = evaluation.classes();
                let recall = recall.iter().filter(|c| c.support > 0).map(|c| c.recall);
                let plot = confusion_matrix(evaluation, &self.labels)?;
                step = step
                    .histogram("probability/named_class", named)
                    .histogram("probability/true_class", truth)
                    .histogram("recall/classes", recall)
                    .image("confusion_matrix", [plot.width, plot.height], &plot.png()?);
            }
            let io = |error| ReportError::io(&self.out, error);
            let events = match &mut self.events {
                Some(events) => events,
                empty => empty.insert(EventFile::create(&self.out).map_err(io)?),
            };
            events.add(epoch.epoch, step).map_err(io)?;
            *told = Some(epoch.epoch);
        }
        Ok(())
    }
}

/// The numbers of an epoch under the tags that TensorBoard groups them by.
fn scalars(epoch: &Epoch) -> [(&'static str, Option<f64>); 9] {
    [
        ("loss/train", epoch.train_loss),
        ("loss/val", epoch.val_loss),
        ("accuracy/train", epoch.train_accuracy),
        ("accuracy/val", epoch.val_accuracy),
        ("accuracy/val_top5", epoch.val_top5),
        ("macro_f1/val", epoch.val_macro_f1),
        ("learning_rate", epoch.learning_rate),
        ("images_per_second", epoch.images_per_second),
        ("seconds", epoch.seconds),
    ]
}

/// Removes what a report of an earlier run left in a folder.
///
/// # Errors
/// Where a file cannot be removed.
pub fn remove_reports(folder: &Path) -> Result<(), ReportError> {
    for name in [REPORT_FILE, CONFUSION_FILE] {
        let path = folder.join(name);
        if path.exists() {
            fs::remove_file(&path).map_err(|e| ReportError::io(&path, e))?;
        }
    }
    if folder.is_dir() {
        tensorboard::remove_events(folder).map_err(|e| ReportError::io(folder, e))?;
    }
    Ok(())
}

/// Settings by name, as config.toml has them.
fn pairs(settings: &Settings) -> Vec<(String, Setting)> {
    let table = toml::Table::try_from(settings).unwrap_or_default();
    let value = |value: toml::Value| match value {
        toml::Value::String(text) => Setting::Text(text),
        toml::Value::Integer(number) => Setting::Number(number as f64),
        toml::Value::Float(number) => Setting::Number(number),
        toml::Value::Boolean(on) => Setting::Switch(on),
        other => Setting::Text(other.to_string()),
    };
    table.into_iter().map(|(k, v)| (k, value(v))).collect()
}

fn shown_setting(setting: &Setting) -> String {
    match setting {
        Setting::Text(text) => text.clone(),
        Setting::Switch(true) => "yes".into(),
        Setting::Switch(false) => "no".into(),
        Setting::Number(number) if *number != 0.0 && number.abs() < 1e-3 => format!("{number:e}"),
        Setting::Number(number) => number.to_string(),
    }
}

/// A folder's or file's name without its ending.
fn stem(data: &str) -> String {
    let stem = Path::new(data).file_stem();
    stem.map_or_else(|| data.to_string(), |s| s.to_string_lossy().into_owned())
}
