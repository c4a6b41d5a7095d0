//! What a run does where nobody said: settings chosen by the size of the data and the way of
//! training.

use toml::{Table, Value};

use super::settings::{HeadStart, LearningRate, Norms, Settings};

/// What the choices depend on.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Images to train on.
    pub images: usize,
    /// MNIST's digits and clothes, which do not vary as photos do.
    pub digits: bool,
}

/// Settings that only steps of gradients have: who gives one of them with `--freeze backbone` wants
/// the head trained that way.
const OF_STEPS: [&str; 21] = [
    "epochs",
    "time",
    "learning_rate",
    "optimizer",
    "momentum",
    "nesterov",
    "weight_decay",
    "schedule",
    "warmup",
    "accumulate",
    "clip_norm",
    "ema",
    "patience",
    "batch_size",
    "augment",
    "color_jitter",
    "hue_jitter",
    "random_erasing",
    "mixup",
    "cutmix",
    "head",
];

/// Fills in what `given` leaves open. Gives the settings, and what was chosen by the size of the
/// data, in words.
///
/// # Errors
/// What cannot be a setting.
pub fn complete(given: Table, facts: Facts) -> Result<(Settings, Option<String>), String> {
    let text = |key: &str| given.get(key).and_then(Value::as_str);
    let scratch = given.get("from_scratch").and_then(Value::as_bool) == Some(true);
    let freeze = match text("freeze") {
        None | Some("auto") if scratch => "none",
        None => "auto",
        Some(freeze) => freeze,
    };
    let head_only = freeze == "backbone";
    let steps = OF_STEPS.iter().any(|&key| match given.get(key) {
        None => false,
        // What a fitted head does anyway.
        Some(value) if key == "augment" => value.as_str() != Some("none"),
        Some(value) if key == "head" => value.as_str() != Some("fit"),
        Some(_) => key != "batch_size",
    });
    let head = match text("head") {
        Some("fit") => HeadStart::Fit,
        None if freeze == "auto" || head_only && !steps => HeadStart::Fit,
        _ => HeadStart::Train,
    };
    let fitted_only = head_only && head == HeadStart::Fit;
    let sgd = text("optimizer") == Some("sgd");
    let mut all = toml::toml! {
        model = "mobilenet_v2"
        from_scratch = false
        reset_head = false
        val_split = 0.2
        max_pixels = 100000000
        epochs = 10
        batch_size = 32
        accumulate = 1
        optimizer = "adamw"
        momentum = 0.9
        nesterov = false
        layer_decay = 1.0
        schedule = "cosine"
        label_smoothing = 0.0
        color_jitter = 0.0
        hue_jitter = 0.0
        random_erasing = 0.0
        mixup = 0.0
        cutmix = 0.0
        class_weights = "none"
        metric = "accuracy"
        exact = false
        precision = "f32"
        seed = 0
    };
    let mut set = |key: &str, value: Value| all.insert(key.into(), value);
    set("freeze", freeze.into());
    set(
        "head",
        match head {
            HeadStart::Fit => "fit",
            HeadStart::Train => "train",
        }
        .into(),
    );
    let norms = if freeze == "auto" { "stored" } else { "batch" };
    set("norms", norms.into());
    let still = facts.digits || head_only && !fitted_only;
    set("augment", if still { "none" } else { "light" }.into());
    let rate = match (sgd, scratch || head_only) {
        (true, _) => 0.01,
        (false, true) => 1e-3,
        (false, false) => 1e-4,
    };
    set("learning_rate", rate.into());
    set("weight_decay", if sgd { 1e-4 } else { 0.05 }.into());
    if fitted_only {
        set("epochs", 0.into());
    }
    let gentle = (freeze == "auto").then(|| Gentle::of(facts.images, sgd));
    if let Some(gentle) = &gentle {
        set("epochs", gentle.epochs.into());
        set("batch_size", gentle.batch_size.into());
        set("learning_rate", gentle.rate.into());
        set("layer_decay", gentle.layer_decay.into());
    }
    if given.contains_key("time") && !given.contains_key("epochs") {
        // The time sets the limit; a fitted head is not worth more than this.
        let most = if freeze == "auto" { 20 } else { 10_000 };
        set("epochs", most.into());
    }
    let chosen: Vec<&str> = ["epochs", "batch_size", "learning_rate"]
        .into_iter()
        .filter(|key| !given.contains_key(*key))
        .collect();
    let epochs = given.get("epochs").or(all.get("epochs"));
    let epochs = epochs.and_then(number).unwrap_or(0.0);
    all.insert("warmup".into(), (epochs / 10.0).min(1.0).into());
    // Whole numbers are numbers too.
    let floats: Vec<String> = all
        .iter()
        .filter(|(_, value)| value.is_float())
        .map(|(key, _)| key.clone())
        .chain(["ema", "clip_norm", "time"].map(String::from))
        .collect();
    let choose = gentle.is_some() && !chosen.is_empty();
    for (key, value) in given {
        let value = match value {
            Value::Integer(i) if floats.contains(&key) => (i as f64).into(),
            value => value,
        };
        all.insert(key, value);
    }
    let settings: Settings = all
        .try_into()
        .map_err(|e: toml::de::Error| e.message().to_string())?;
    let said = choose.then(|| describe(&settings, facts));
    Ok((settings, said))
}

fn number(value: &Value) -> Option<f64> {
    value.as_float().or(value.as_integer().map(|i| i as f64))
}

/// How the whole network is trained from a fitted head.
struct Gentle {
    epochs: i64,
    batch_size: i64,
    rate: f64,
    layer_decay: f64,
}

impl Gentle {
    /// From 1e-4 for 300 images and fewer to 3e-4 for 1000 and more: a large rate takes from a head
    /// that few images hold in place more than the rest of the network can learn from them.
    fn of(images: usize, sgd: bool) -> Self {
        let size = (images as f64 / 300.0).clamp(1.0, 1000.0 / 300.0);
        let exponent = 3f64.ln() / (1000f64 / 300.0).ln();
        // Two digits are enough.
        let rate = 1e-5 * (10.0 * size.powf(exponent)).round();
        Self {
            epochs: 6,
            batch_size: 16,
            rate: if sgd { 30.0 * rate } else { rate },
            layer_decay: 0.9,
        }
    }
}

/// What a run will do with the whole network.
fn describe(settings: &Settings, facts: Facts) -> String {
    let norms = match settings.norms {
        Norms::Stored => ", norms as they are",
        Norms::Batch => "",
    };
    let rate = match settings.learning_rate {
        LearningRate::Is(rate) => format!("rate {rate:.1e}"),
        LearningRate::Found(_) => "a rate to be found".to_string(),
    };
    let epochs = match settings.time {
        Some(_) => "as many epochs as the time allows".to_string(),
        None => format!("{} epochs", settings.epochs),
    };
    format!(
        "for {} images: first the head on the frozen network; then all of it, {epochs} of {} batches of {}, {rate}, less by a factor of {} each stage towards the image{norms}",
        facts.images,
        facts.images.div_ceil(settings.batch_size.max(1)),
        settings.batch_size,
        settings.layer_decay,
    )
}
