use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use serde::Serialize;
use signal_hook::consts::TERM_SIGNALS;
use toml::Table;

use super::{DEFAULT_MODEL, Global, Outcome, ReportFormat, complain};
use crate::data::{Dataset, Skipped, default_cache_bytes};
use crate::exec::check_precision;
use crate::exec::params::{LoadReport, TensorSource};
use crate::hub::Hub;
use crate::models::Preprocessing;
use crate::report::{ReportError, RunReport, remove_reports, write_classes};
use crate::train::{
    BatchReport, CHECKPOINT_FILE, CONFIG_FILE, End, EpochReport, Event, Facts, Finding, HeadReport,
    MODEL_FILE, RateReport, Run, Settings, State, Summary, complete,
};
use crate::weights::{Description, FORMAT_VERSION, Request, WeightsChoice, resolve_for_training};

/// Teach a network the classes of a folder of images
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sconce finetune flowers/                       first the head, then all of the network
  sconce finetune flowers/ --time 5m             what five minutes can buy
  sconce finetune flowers/ --freeze backbone     the head only: seconds
  sconce finetune data/ -m resnet18 --weights resnet18.pth -o runs/first --epochs 20
  sconce finetune -o runs/first --resume         go on after Ctrl-C or a crash, as if never stopped
  sconce finetune --config runs/first/config.toml -o runs/second --seed 1
  sconce finetune flowers/ --augment trivial --mixup 0.2 --cutmix 1 --label-smoothing 0.1
  sconce finetune mnist:mnist/ -m resnet18 --from-scratch --image-size 32
  sconce classify -m runs/first/model.safetensors photo.jpg

DATA is a folder of class folders; one that holds train/ and val/ (or valid/, validation/) with class
folders each; a CSV with the columns path,label[,split]; mnist, fashion-mnist or cifar10, from the
hub, or from files on disk as mnist:DIR; or an image data set of the hub as hub:OWNER/NAME. Ctrl-C
ends the run after the batch, with all of it saved.

With nothing else said, the head that suits the network as it is best is found first (epoch 0), by
logistic regression on what the network makes of the images; then all of the network is trained at a
low rate that follows from the number of images, and the best by validation is kept.")]
pub struct Arguments {
    /// Images and their classes
    #[arg(value_name = "DATA", required_unless_present_any = ["resume", "config"])]
    data: Option<String>,
    /// Folder for the results [default: runs/DATA-MODEL]
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the run in --out
    #[arg(long, conflicts_with_all = ["force", "config"])]
    resume: bool,
    /// Replace the run in --out
    #[arg(long)]
    force: bool,
    /// Settings of another run: its config.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Save within an epoch too, when so many seconds have passed
    #[arg(long, value_name = "S", default_value = "60", value_parser = seconds)]
    checkpoint_every: Duration,
    /// Memory for decoded images, which later epochs then need not decode again, as 500M or 2G; it
    /// changes no result [default: a quarter of what is free]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    cache_memory: Option<u64>,
    /// How to print the result
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    format: ReportFormat,
    #[command(flatten)]
    given: Given,
}

/// Settings that were given, under the names that [`Settings`] has for them.
#[derive(Debug, Args, Serialize)]
struct Given {
    /// Passes over the training images [default: 10; 6 with --freeze auto; 0 where --freeze backbone
    /// fits the head; with --time as many as fit, at most 20 with --freeze auto]
    #[arg(long, value_name = "N")]
    epochs: Option<u64>,
    /// Images of one gradient [default: 32; 16 with --freeze auto]
    #[arg(short, long, value_name = "N")]
    batch_size: Option<usize>,
    /// Batches whose gradients make one step [default: 1]
    #[arg(long, value_name = "N")]
    accumulate: Option<usize>,
    /// Time for the whole run, like 90s, 5m or 1h30m: epochs and the schedule are planned to end
    /// within it
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    time: Option<f64>,
    /// Highest learning rate; auto tries rates from low to high before the first step and takes the
    /// one where the loss falls most steeply [default: by the size of the data with --freeze auto;
    /// else adamw 1e-4, its head alone or from scratch 1e-3, sgd 0.01]
    #[arg(long = "lr", value_name = "F|auto", value_parser = rate)]
    learning_rate: Option<toml::Value>,
    /// What stays as it is: all but the head at first, then nothing (auto); nothing; all but the
    /// head (backbone); or all up to a stage like layer2 [default: auto, from scratch none]
    #[arg(long, value_name = "auto|none|backbone|STAGE")]
    freeze: Option<String>,
    /// What the head is before the first step: the one that suits the frozen network best (fit), or
    /// that of the weights or a random one (train) [default: fit with --freeze auto, and with
    /// --freeze backbone where no setting of the training is given]
    #[arg(long, value_enum)]
    head: Option<Head>,
    /// What batch norms go by: the batch, or the statistics that they came with, which then stay
    /// [default: stored with --freeze auto, else batch]
    #[arg(long, value_enum)]
    norms: Option<Norms>,
    /// With several processes (mpirun, srun): let batch norms go by the statistics of the whole batch,
    /// not of each process's part
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    sync_bn: bool,
    /// Begin with random weights
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    from_scratch: bool,
    /// Begin with a fresh head even where the weights have one of the right size
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    reset_head: bool,
    /// How gradients become steps [default: adamw]
    #[arg(long, value_enum)]
    optimizer: Option<Optimizer>,
    /// Of sgd [default: 0.9]
    #[arg(long, value_name = "F")]
    momentum: Option<f64>,
    /// Nesterov's momentum, of sgd
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    nesterov: bool,
    /// Not applied to norms and biases [default: adamw 0.05, sgd 1e-4]
    #[arg(long, value_name = "F")]
    weight_decay: Option<f64>,
    /// Each stage learns so much more slowly than the next [default: 1; 0.9 with --freeze auto]
    #[arg(long, value_name = "F")]
    layer_decay: Option<f64>,
    /// How the learning rate falls [default: cosine]
    #[arg(long, value_enum)]
    schedule: Option<Schedule>,
    /// Epochs over which the learning rate rises [default: a tenth of all, at most 1]
    #[arg(long, value_name = "EPOCHS")]
    warmup: Option<f64>,
    /// Scale gradients down to this norm
    #[arg(long, value_name = "F")]
    clip_norm: Option<f64>,
    /// Share of the target that is spread over all classes [default: 0]
    #[arg(long, value_name = "F")]
    label_smoothing: Option<f64>,
    /// Whether classes of few images count more [default: none]
    #[arg(long, value_enum)]
    class_weights: Option<Weighting>,
    /// How training images vary: light is random parts and mirror images, trivial adds one operation
    /// of any strength (TrivialAugmentWide), rand two of medium strength (RandAugment) [default:
    /// light; none for MNIST's digits and with a frozen backbone]
    #[arg(long, value_enum)]
    augment: Option<Augmentation>,
    /// Vary brightness, contrast and saturation by up to this share [default: 0]
    #[arg(long, value_name = "F")]
    color_jitter: Option<f64>,
    /// Turn the hue by up to this part of the circle, at most 0.5 [default: 0]
    #[arg(long, value_name = "F")]
    hue_jitter: Option<f64>,
    /// Erase a rectangle of an image with this probability [default: 0]
    #[arg(long, value_name = "P")]
    random_erasing: Option<f64>,
    /// Average images of a batch, and their classes, by shares from a beta distribution with this
    /// alpha: 0.2 is usual [default: 0, not at all]
    #[arg(long, value_name = "ALPHA")]
    mixup: Option<f64>,
    /// Put a rectangle of another image in place, its area from a beta distribution with this alpha:
    /// 1 is usual; with --mixup, one or the other at random [default: 0, not at all]
    #[arg(long, value_name = "ALPHA")]
    cutmix: Option<f64>,
    /// Judge and keep a moving average of the weights, with this decay [0.999 where no number is
    /// given]
    #[arg(long, value_name = "F", num_args = 0..=1, default_missing_value = "0.999", require_equals = true)]
    ema: Option<f64>,
    /// End after so many epochs without improvement
    #[arg(long, value_name = "N")]
    patience: Option<u64>,
    /// What the best epoch is best in [default: accuracy]
    #[arg(long, value_enum)]
    metric: Option<BestBy>,
    /// Height and width of the images [default: what the network was trained on]
    #[arg(long, value_name = "N")]
    image_size: Option<usize>,
    /// Share of every class to validate on, where DATA does not say [default: 0.2]
    #[arg(long, value_name = "F")]
    val_split: Option<f64>,
    /// Refuse images of more pixels [default: 100000000]
    #[arg(long, value_name = "N")]
    max_pixels: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Optimizer {
    Sgd,
    #[value(name = "adamw")]
    AdamW,
}

#[derive(Clone, Copy, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Head {
    Fit,
    Train,
}

#[derive(Clone, Copy, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Norms {
    Batch,
    Stored,
}

#[derive(Clone, Copy, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Schedule {
    Cosine,
    Step,
    Constant,
}

#[derive(Clone, Copy, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Weighting {
    Auto,
    None,
}

#[derive(Clone, Copy, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Augmentation {
    None,
    Light,
    Trivial,
    Rand,
}

#[derive(Clone, Copy, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum BestBy {
    Accuracy,
    MacroF1,
}

fn rate(text: &str) -> Result<toml::Value, String> {
    match text.parse::<f64>() {
        _ if text == "auto" => Ok(text.into()),
        Ok(rate) => Ok(rate.into()),
        Err(_) => Err("expected a number, or auto".into()),
    }
}

/// Seconds of a time like 90s, 5m or 1h30m.
fn duration(text: &str) -> Result<f64, String> {
    let wrong = || "expected a time like 90s, 5m or 1h30m".to_string();
    let (mut seconds, mut digits) = (0.0, String::new());
    for letter in text.chars() {
        let unit = match letter {
            'h' => 3600.0,
            'm' => 60.0,
            's' => 1.0,
            '0'..='9' | '.' => {
                digits.push(letter);
                continue;
            }
            _ => return Err(wrong()),
        };
        let number: f64 = digits.parse().map_err(|_| wrong())?;
        seconds += number * unit;
        digits.clear();
    }
    // A number without a unit is of seconds, if it is all there is.
    match digits.parse::<f64>() {
        Ok(number) if digits.len() == text.len() => Ok(number),
        Err(_) if digits.is_empty() && !text.is_empty() => Ok(seconds),
        _ => Err(wrong()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "expected a number of seconds".into())
}

/// A number of bytes, with K, M or G for powers of 1024.
fn bytes(text: &str) -> Result<u64, String> {
    let text = text.trim_end_matches(['B', 'b']).trim_end_matches("i");
    let (number, shift) = match text.char_indices().next_back() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: Option<f64> = number.trim().parse().ok();
    number
        .filter(|n| *n >= 0.0 && n.is_finite())
        .map(|n| (n * f64::from(1u32 << shift)) as u64)
        .ok_or_else(|| "expected a size such as 500M or 2G".into())
}

pub fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let Prepared { run, state, notes } = prepare(global, arguments)?;
    let stop = run.stop.clone();
    for signal in TERM_SIGNALS {
        // The second one does not wait for the batch.
        signal_hook::flag::register_conditional_shutdown(*signal, INTERRUPTED, stop.clone())
            .and_then(|_| signal_hook::flag::register(*signal, stop.clone()))
            .context("cannot watch for signals")?;
    }
    let mut watcher = Watcher::new(global);
    for note in run.dataset.notices.notes.iter().chain(&notes) {
        watcher.say(note);
    }
    // All ranks look at the same folders.
    for place in run
        .dataset
        .notices
        .skipped
        .iter()
        .filter(|_| run.ranks.is_first())
    {
        watcher.leave_out(place);
    }
    let out = run.out.clone();
    let labels = run.model.labels.clone();
    let ranks = global.ranks.clone();
    let mut report = ranks.is_first().then(|| RunReport::new(&run));
    let end = run.fit(state.as_ref(), &mut |event| {
        if let (Event::Epoch(epoch, evaluation), Some(report)) = (&event, &mut report) {
            watcher.note_failure(report.epoch(epoch, evaluation));
        }
        watcher.see(event);
    });
    watcher.bar.finish_and_clear();
    if let (Ok(end), Some(mut report)) = (&end, report) {
        watcher.note_failure(report.finish(matches!(end, End::Finished(_))));
    }
    match end? {
        End::Interrupted { epoch } => {
            watcher.say(&if out.join(CHECKPOINT_FILE).exists() {
                format!(
                    "interrupted after {epoch} epochs; all is saved (go on with: sconce finetune -o {} --resume)",
                    out.display()
                )
            } else {
                "interrupted before anything was learned".to_string()
            });
            Ok(Outcome::Interrupted)
        }
        End::Finished(summary) => {
            let [left_out] = ranks.sum([watcher.left_out as f64]);
            if !ranks.is_first() {
                return Ok(Outcome::AllDone);
            }
            let mut stdout = global.stdout();
            match arguments.format {
                ReportFormat::Json => {
                    let report = JsonSummary::new(&out, &summary);
                    writeln!(stdout, "{}", serde_json::to_string(&report)?)?;
                }
                ReportFormat::Text => write_text(&mut stdout, &summary, &labels)?,
            }
            if left_out == 0.0 {
                return Ok(Outcome::AllDone);
            }
            watcher.say(&format!("left out as unreadable: {left_out}"));
            Ok(Outcome::SomeFailed)
        }
    }
}

const INTERRUPTED: i32 = 130;

struct Prepared {
    run: Run,
    state: Option<State>,
    /// What a person should know before it begins.
    notes: Vec<String>,
}

fn prepare(global: &Global, arguments: &Arguments) -> anyhow::Result<Prepared> {
    let given = given(global, arguments)?;
    let device = global.device()?;
    let mut notes = Vec::new();
    let hub = global.hub();
    let (settings, dataset, state, out) = if arguments.resume {
        let out = match (&arguments.out, &arguments.data) {
            (Some(out), _) => out.clone(),
            (None, Some(data)) => default_out(data, model_name(&given)),
            (None, None) => bail!("--resume: which run? (give its folder with -o DIR)"),
        };
        let path = out.join(CHECKPOINT_FILE);
        if !path.exists() {
            if let Some(data) = &arguments.data
                && Path::new(data).join(CHECKPOINT_FILE).exists()
            {
                bail!("--resume: {data} is a run and no data (go on with -o {data} --resume)");
            }
            bail!(
                "--resume: no {} (it begins to be there with the first epoch's end; start afresh with --force)",
                path.display()
            );
        }
        let state = State::open(&path)?;
        check_unchanged(&state.settings, &given)?;
        let settings = state.settings.clone();
        let dataset = open_data(&settings, &hub)?;
        (settings, dataset, Some(state), out)
    } else {
        let mut table = match &arguments.config {
            Some(path) => read_config(path)?,
            None => Table::new(),
        };
        if ["time", "epochs", "batch_size", "accumulate"]
            .iter()
            .any(|&key| given.contains_key(key))
        {
            // What was planned is for other settings.
            table.remove("steps");
            table.remove("last_step");
        }
        table.extend(given);
        let (settings, dataset) = resolve(table, arguments.config.as_deref(), &hub, &mut notes)?;
        let out = match &arguments.out {
            Some(out) => out.clone(),
            None => default_out(&settings.data, &settings.model),
        };
        (settings, dataset, None, out)
    };
    let (model, source) = match &state {
        Some(state) => {
            let at = &state.progress;
            notes.push(format!(
                "goes on after epoch {} of {}, batch {}",
                at.epoch, settings.epochs, at.batch
            ));
            (state.model.clone(), None)
        }
        None => starting_point(&settings, &dataset, global.hub(), &mut notes)?,
    };
    check_precision(&device, settings.precision)?;
    let settings = Settings {
        image_size: Some(model.preprocessing.crop),
        ..settings
    };
    notes.push(format!(
        "{} on {}: {} classes, {} images to train on, {} to validate",
        model.name,
        settings.data,
        dataset.classes.len(),
        dataset.train.len(),
        dataset.validation.len()
    ));
    if state.is_none() && global.ranks.is_first() {
        make_folder(&out, arguments.force)?;
    }
    let run = Run {
        settings,
        model,
        source,
        dataset,
        device,
        threads: global.threads(),
        cache_bytes: arguments.cache_memory.unwrap_or_else(default_cache_bytes),
        out,
        checkpoint_every: arguments.checkpoint_every,
        stop: Arc::new(AtomicBool::new(false)),
        ranks: global.ranks.clone(),
    };
    if state.is_none() {
        run.write_config()?;
    }
    Ok(Prepared { run, state, notes })
}

/// The settings that the command line names.
fn given(global: &Global, arguments: &Arguments) -> anyhow::Result<Table> {
    let mut given = Table::try_from(&arguments.given)?;
    let text = |value: &Path| -> anyhow::Result<toml::Value> {
        match value.to_str() {
            Some(text) => Ok(text.into()),
            None => bail!("{}: its name is not valid UTF-8", value.display()),
        }
    };
    if let Some(data) = &arguments.data {
        given.insert("data".into(), data.as_str().into());
    }
    if let Some(model) = &global.model {
        given.insert("model".into(), model.as_str().into());
    }
    match &global.weights {
        None => {}
        Some(path) if path.as_os_str() == "none" => {
            given.insert("from_scratch".into(), true.into());
        }
        Some(path) => {
            given.insert("weights".into(), text(path)?);
        }
    }
    if let Some(seed) = global.seed {
        let seed = i64::try_from(seed).context("--seed: too large")?;
        given.insert("seed".into(), seed.into());
    }
    if global.exact {
        given.insert("exact".into(), true.into());
    }
    if let Some(precision) = global.precision {
        given.insert("precision".into(), precision.to_string().into());
    }
    Ok(given)
}

fn read_config(path: &Path) -> anyhow::Result<Table> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let table = text.parse::<Table>();
    table.map_err(|e| anyhow::anyhow!("{}: {}", path.display(), e.message()))
}

fn model_name(table: &Table) -> &str {
    let model = table.get("model").and_then(toml::Value::as_str);
    model.unwrap_or(DEFAULT_MODEL)
}

/// Fills in what was not given, by what the data are.
fn resolve(
    table: Table,
    config: Option<&Path>,
    hub: &Hub,
    notes: &mut Vec<String>,
) -> anyhow::Result<(Settings, Dataset)> {
    let from = config.map_or("settings".into(), |path| path.display().to_string());
    if !table.contains_key("data") {
        bail!("no DATA given");
    }
    let complete = |table: Table, facts: Facts| {
        let completed = complete(table, facts).map_err(|e| anyhow::anyhow!("{from}: {e}"))?;
        match completed.0.check() {
            Ok(()) => Ok(completed),
            Err((name, expected)) => bail!("--{name}: expected {expected}"),
        }
    };
    // What is wrong is said before the data are looked for.
    let unknown = Facts {
        images: 0,
        digits: false,
    };
    let (settings, _) = complete(table.clone(), unknown)?;
    let dataset = open_data(&settings, hub)?;
    let named = settings.data.split(':').next().unwrap_or_default();
    let facts = Facts {
        images: dataset.train.len(),
        digits: ["mnist", "fashion-mnist"].contains(&named),
    };
    let (settings, chosen) = complete(table, facts)?;
    notes.extend(chosen);
    Ok((settings, dataset))
}

fn open_data(settings: &Settings, hub: &Hub) -> anyhow::Result<Dataset> {
    Ok(Dataset::open(
        &settings.data,
        settings.val_split,
        settings.seed,
        hub,
    )?)
}

/// What was given again must be what the run was started with.
fn check_unchanged(settings: &Settings, given: &Table) -> anyhow::Result<()> {
    let started = Table::try_from(settings)?;
    let number = |value: &toml::Value| value.as_float().or(value.as_integer().map(|i| i as f64));
    for (key, value) in given {
        let before = started.get(key);
        // What was found or planned has taken the place of what was asked for.
        let found = key == "learning_rate" && value.as_str() == Some("auto")
            || key == "epochs" && settings.steps.is_some();
        let same = found
            || before == Some(value)
            || before.is_some_and(|b| number(b).is_some() && number(b) == number(value));
        if !same {
            let before = before.map_or("not set".into(), ToString::to_string);
            bail!(
                "--resume: {key} is {value}, and the run was started with {before} (leave it out, or start a run of its own with another --out)"
            );
        }
    }
    Ok(())
}

/// `runs/DATA-MODEL`
fn default_out(data: &str, model: &str) -> PathBuf {
    let (kind, path) = match data.split_once(':') {
        Some((kind @ ("mnist" | "fashion-mnist" | "cifar10"), _)) => (Some(kind), data),
        // The name without its owner and its revision.
        Some(("hub", id)) => {
            let id = id.split('@').next().unwrap_or_default();
            (id.rsplit('/').next(), data)
        }
        _ => (None, data),
    };
    let stem = |path: &str| {
        let path = Path::new(path);
        let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let stem = path.file_stem().unwrap_or_default();
        stem.to_string_lossy().into_owned()
    };
    let data = kind.map_or_else(|| stem(path), str::to_string);
    let model = match model.split_once('.') {
        Some((name, _)) if !model.contains(['/', '\\']) => name.to_string(),
        _ => stem(model),
    };
    Path::new("runs").join(format!("{data}-{model}"))
}

/// Makes the folder, and refuses one that holds a run.
fn make_folder(out: &Path, force: bool) -> anyhow::Result<()> {
    let files = [MODEL_FILE, CHECKPOINT_FILE, CONFIG_FILE].map(|name| out.join(name));
    let metrics = out.join(crate::train::METRICS_FILE);
    let mut held = files.iter().chain([&metrics]).filter(|path| path.exists());
    if !force && let Some(path) = held.next() {
        bail!(
            "--out {}: holds a run ({}; go on with --resume, replace it with --force, or choose another folder)",
            out.display(),
            path.file_name().unwrap_or_default().to_string_lossy()
        );
    }
    for path in held {
        fs::remove_file(path).with_context(|| path.display().to_string())?;
    }
    remove_reports(out)?;
    fs::create_dir_all(out).with_context(|| format!("--out {}", out.display()))
}

type Start = (Description, Option<Arc<dyn TensorSource>>);

/// The network and the weights to begin with.
fn starting_point(
    settings: &Settings,
    dataset: &Dataset,
    hub: Hub,
    notes: &mut Vec<String>,
) -> anyhow::Result<Start> {
    let weights = match &settings.weights {
        _ if settings.from_scratch => WeightsChoice::None,
        Some(path) => WeightsChoice::File(path.into()),
        None => WeightsChoice::Published,
    };
    let request = Request {
        model: settings.model.clone(),
        weights,
        labels: None,
        seed: settings.seed,
        hub,
    };
    let model = resolve_for_training(&request, dataset.classes.len(), settings.reset_head)?;
    match (&model.report, model.weights_from()) {
        (Some(report), Some(from)) => notes.extend(describe_load(report, from)),
        _ => notes.push("begins with random weights".into()),
    }
    let old = model.preprocessing;
    let preprocessing = match settings.image_size {
        None if !dataset.tiny => old,
        size => {
            let crop = size.unwrap_or(old.crop);
            // Nothing is cut off a tiny picture.
            let resize = if dataset.tiny {
                crop
            } else {
                (crop * old.resize + old.crop / 2) / old.crop
            };
            Preprocessing {
                resize,
                crop,
                ..old
            }
        }
    };
    // A name's tag stands for weights that these will no longer be.
    let name = model.name.split('.').next().unwrap_or_default();
    let description = Description {
        format_version: FORMAT_VERSION,
        name: name.to_string(),
        architecture: model.architecture,
        labels: dataset.classes.clone(),
        preprocessing,
        temperature: 1.0,
    };
    Ok((description, model.source))
}

/// How the weights met the network, for people.
fn describe_load(report: &LoadReport, from: &str) -> Vec<String> {
    let some = |names: Vec<&String>| {
        const SHOWN: usize = 4;
        let shown: Vec<&str> = names.iter().take(SHOWN).map(|n| n.as_str()).collect();
        let more = names.len().saturating_sub(SHOWN);
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        format!("{}{more}", shown.join(", "))
    };
    let mut notes = vec![format!(
        "weights of {from}: {} tensors loaded, {} missing, {} of another shape, {} unexpected",
        report.loaded.len(),
        report.missing.len(),
        report.mismatched.len(),
        report.unexpected.len()
    )];
    if !report.missing.is_empty() {
        let names = some(report.missing.iter().collect());
        notes.push(format!("missing, so they begin afresh: {names}"));
    }
    if !report.mismatched.is_empty() {
        let names = some(report.mismatched.keys().collect());
        notes.push(format!("of another shape, so they begin afresh: {names}"));
    }
    if !report.unexpected.is_empty() {
        let names = some(report.unexpected.iter().collect());
        notes.push(format!("unexpected, so they are left out: {names}"));
    }
    notes
}

/// Shows what happens.
struct Watcher {
    quiet: bool,
    verbose: bool,
    terminal: bool,
    bar: ProgressBar,
    epochs: u64,
    /// Images and folders that could not be read.
    left_out: usize,
    /// Said once.
    reports_fail: bool,
}

impl Watcher {
    fn new(global: &Global) -> Self {
        Self {
            quiet: global.quiet,
            verbose: global.verbose,
            terminal: !global.quiet && io::stderr().is_terminal(),
            bar: ProgressBar::hidden(),
            epochs: 0,
            left_out: 0,
            reports_fail: false,
        }
    }

    fn say(&self, line: &str) {
        if !self.quiet {
            self.bar.suspend(|| complain(line));
        }
    }

    /// Names what could not be read.
    fn leave_out(&mut self, image: &Skipped) {
        self.left_out += 1;
        let line = format!("{}: {} (left out)", image.name.escape_debug(), image.reason);
        self.bar.suspend(|| complain(&line));
    }

    /// A report that cannot be written ends no run.
    fn note_failure(&mut self, written: Result<(), ReportError>) {
        if let Err(error) = written
            && !std::mem::replace(&mut self.reports_fail, true)
        {
            self.bar
                .suspend(|| complain(&format!("{error} (the run goes on)")));
        }
    }

    fn see(&mut self, event: Event) {
        match event {
            Event::Skipped(image) => self.leave_out(image),
            Event::Features { done, total } => {
                self.set_bar(total as u64, done as u64, "frozen part: {pos}/{len} images");
                if done == total {
                    self.bar.finish_and_clear();
                    self.bar = ProgressBar::hidden();
                }
            }
            Event::Head(report) => self.say(&describe_head(report)),
            Event::Rate(report) => self.say(&describe_rate(report)),
            Event::Planned(plan) => self.say(&format!(
                "in {:.0} s: {} steps, {:.1} epochs, {:.2} s each batch",
                plan.seconds, plan.steps, plan.epochs, plan.step_seconds
            )),
            Event::TimeUp { step, planned } => self.say(&format!(
                "the time is up after step {step} of the {planned} that were planned"
            )),
            Event::Batch(report) => self.batch(&report),
            Event::Epoch(report, _) => self.epoch(report),
        }
    }

    fn set_bar(&mut self, length: u64, position: u64, template: &str) {
        if !self.terminal {
            return;
        }
        if self.bar.is_hidden() {
            let style = ProgressStyle::with_template(&format!("{{bar:24}} {template}"));
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            self.bar = ProgressBar::new(length).with_style(style);
        }
        self.bar.set_position(position);
    }

    fn batch(&mut self, report: &BatchReport) {
        if self.verbose {
            let BatchReport {
                epoch,
                batch,
                batch_loss,
                learning_rate,
                ..
            } = report;
            self.say(&format!(
                "epoch {epoch}, batch {batch}: loss {batch_loss:.8}, rate {learning_rate:.2e}"
            ));
        }
        self.epochs = report.epochs;
        self.set_bar(report.batches, report.batch, "{msg}");
        self.bar.set_message(format!(
            "epoch {}/{}  loss {:.4}  accuracy {:.1} %  rate {:.1e}  {:.0} images/s  {} left",
            report.epoch,
            report.epochs,
            report.loss,
            100.0 * report.accuracy,
            report.learning_rate,
            report.images_per_second,
            HumanDuration(report.left)
        ));
    }

    fn epoch(&mut self, report: &EpochReport) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::hidden();
        let best = if report.is_best { "  best so far" } else { "" };
        if report.epoch == 0 {
            return self.say(&format!(
                "head alone  validation: loss {:.4}  accuracy {:.2} %  macro-F1 {:.2} %  {:.1} s",
                report.val_loss,
                100.0 * report.val_accuracy,
                100.0 * report.val_macro_f1,
                report.seconds,
            ));
        }
        self.say(&format!(
            "epoch {}/{}  loss {:.4}  accuracy {:.1} %  validation: loss {:.4}  accuracy {:.2} %  macro-F1 {:.2} %  rate {:.1e}  {:.0} images/s  {:.1} s{best}",
            report.epoch,
            self.epochs,
            report.train_loss,
            100.0 * report.train_accuracy,
            report.val_loss,
            100.0 * report.val_accuracy,
            100.0 * report.val_macro_f1,
            report.learning_rate,
            report.images_per_second,
            report.seconds,
        ));
    }
}

/// How a learning rate was found, for people.
fn describe_rate(report: &RateReport) -> String {
    let why = match report.why {
        Finding::Steepest => "where the loss falls most steeply",
        Finding::LowestTenth => {
            "a tenth of where the loss is lowest, since it hardly falls at any rate"
        }
    };
    let [low, high] = report.range;
    format!(
        "learning rate {:.1e}: {why} ({} steps tried, from {low:.0e} to {high:.0e})",
        report.rate, report.steps
    )
}

/// How a head was fitted, for people.
fn describe_head(report: &HeadReport) -> String {
    let mirrored = match report.views {
        1 => "",
        _ => " and their mirror images",
    };
    let chosen = match report.folds {
        0 => "as usual for so many".to_string(),
        1 => format!(
            "chosen on a part left out: accuracy there {:.1} %",
            100.0 * report.held_out_accuracy
        ),
        folds => format!(
            "chosen by {folds}-fold cross-validation: accuracy there {:.1} %",
            100.0 * report.held_out_accuracy
        ),
    };
    format!(
        "head fitted to {} images{mirrored} in {} iterations, strength {} ({chosen})",
        report.images, report.iterations, report.strength
    )
}

/// The last line on standard output.
#[derive(Debug, Serialize)]
struct JsonSummary {
    out: String,
    model: String,
    classes: usize,
    train_images: usize,
    val_images: usize,
    best_epoch: u64,
    val_accuracy: f64,
    val_macro_f1: f64,
    seconds: f64,
}

impl JsonSummary {
    fn new(out: &Path, summary: &Summary) -> Self {
        Self {
            out: out.display().to_string(),
            model: summary.model.display().to_string(),
            classes: summary.classes,
            train_images: summary.train_images,
            val_images: summary.val_images,
            best_epoch: summary.best.epoch,
            val_accuracy: summary.best.accuracy,
            val_macro_f1: summary.best.macro_f1,
            seconds: summary.seconds,
        }
    }
}

fn write_text(out: &mut impl Write, summary: &Summary, labels: &[String]) -> io::Result<()> {
    let Summary { best, .. } = summary;
    let which = match best.epoch {
        0 => "the head on the frozen network".to_string(),
        epoch => format!("epoch {epoch} of {}", summary.epochs),
    };
    writeln!(
        out,
        "best: {which}, accuracy {:.2} %, macro-F1 {:.2} %, after {}",
        100.0 * best.accuracy,
        100.0 * best.macro_f1,
        HumanDuration(Duration::try_from_secs_f64(summary.seconds).unwrap_or_default())
    )?;
    if let Some(evaluation) = &summary.evaluation {
        write_classes(out, labels, &evaluation.classes())?;
    }
    writeln!(
        out,
        "sconce classify -m {} IMAGE...",
        summary.model.display()
    )
}
