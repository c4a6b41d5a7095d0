//! The report as a page: one HTML file that needs nothing from elsewhere.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::charts::{self, Line};
use super::plot::{confusion_matrix, met_classes};
use super::thumbnails::thumbnail;
use super::{Judgement, ReportError, percent};
use crate::data::Decoder;
use crate::train::{ClassMetrics, Evaluation, Verdict};

/// All that a page shows.
pub struct Page<'a> {
    pub title: String,
    /// What was done, in a line.
    pub subtitle: String,
    pub judgement: Judgement<'a>,
    /// What the judged images are.
    pub judged: String,
    /// Lines of metrics.jsonl, for a training run.
    pub epochs: &'a [Epoch],
    /// The epoch that the figures are of.
    pub epoch: Option<u64>,
    /// Images of each class to train on and to validate on, or of the judged images alone.
    pub balance: Balance,
    pub seconds: f64,
    /// Name and value.
    pub settings: Vec<(String, String)>,
    /// How to use the model.
    pub commands: Vec<String>,
    /// For the thumbnails.
    pub decoder: Decoder,
}

/// Images of each class.
pub enum Balance {
    Judged(Vec<usize>),
    Divided {
        train: Vec<usize>,
        validation: Vec<usize>,
    },
}

/// What a line of metrics.jsonl says.
#[derive(Clone, Debug, Default, PartialEq, serde::Deserialize)]
#[serde(default)]
pub struct Epoch {
    pub epoch: u64,
    pub train_loss: Option<f64>,
    pub train_accuracy: Option<f64>,
    pub val_loss: Option<f64>,
    pub val_accuracy: Option<f64>,
    pub val_top5: Option<f64>,
    pub val_macro_f1: Option<f64>,
    pub learning_rate: Option<f64>,
    pub images_per_second: Option<f64>,
    pub seconds: Option<f64>,
}

/// Mistakes and right answers that are shown.
const MISTAKES: usize = 24;
const RIGHT: usize = 8;
/// Classes of a matrix whose labels still fit.
const MATRIX_CLASSES: usize = 24;
/// Rows of a table or bars that a person still looks at.
const ROWS: usize = 100;
const BARS: usize = 40;
const CONFUSIONS: usize = 12;

impl Page<'_> {
    /// The page as HTML.
    ///
    /// # Errors
    /// Where a picture cannot be drawn; photos that cannot be read are left blank.
    pub fn html(&self) -> Result<String, ReportError> {
        let matrix = self.matrix()?;
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="generator" content={ "sconce " (env!("CARGO_PKG_VERSION")) };
                    link rel="icon" href="data:,";
                    title { (self.title) }
                    style { (PreEscaped(include_str!("page.css"))) }
                }
                body { main {
                    h1 { (self.title) }
                    p.soft { (self.subtitle) }
                    (self.tiles())
                    (self.commands())
                    (self.curves())
                    (matrix)
                    (self.sureness())
                    (self.classes())
                    (self.mistakes())
                    (self.right())
                    (self.balance())
                    (self.speed())
                    (self.settings())
                    footer { "Written by sconce " (env!("CARGO_PKG_VERSION")) ". Everything on this page is in this file." }
                } }
            }
        };
        Ok(page.into_string())
    }

    fn evaluation(&self) -> &Evaluation {
        self.judgement.evaluation
    }

    fn label(&self, class: u32) -> &str {
        &self.judgement.labels[class as usize]
    }

    fn tiles(&self) -> Markup {
        let evaluation = self.evaluation();
        let unreadable = self.judgement.unreadable;
        let tile = |value: String, name: &str| html! { div.tile { b { (value) } span { (name) } } };
        html! {
            div.tiles {
                (tile(percent(evaluation.accuracy()), "accuracy"))
                (tile(percent(evaluation.macro_f1()), "macro-F1"))
                @if self.judgement.labels.len() > 5 {
                    (tile(percent(evaluation.top5()), "top-5 accuracy"))
                }
                (tile(format!("{:.4}", evaluation.loss()), "loss (nats)"))
                (tile(percent(evaluation.reliability().error()), "calibration error"))
                (tile(evaluation.images().to_string(), &self.judged))
                @if unreadable > 0 { (tile(unreadable.to_string(), "images that could not be read")) }
                (tile(duration(self.seconds), "took"))
            }
        }
    }

    fn commands(&self) -> Markup {
        html! {
            section {
                h2 { "Use it" }
                pre { code { (self.commands.join("\n")) } }
            }
        }
    }

    fn curves(&self) -> Markup {
        if self.epochs.len() < 2 {
            return html! {};
        }
        let points = |value: fn(&Epoch) -> Option<f64>, scale: f64| -> Vec<(f64, f64)> {
            let points = self
                .epochs
                .iter()
                .filter_map(|e| Some((e.epoch as f64, value(e)? * scale)));
            points.filter(|(_, y)| y.is_finite()).collect()
        };
        let best = self.epoch.map(|epoch| epoch as f64);
        let loss = [
            Line {
                name: "training",
                class: "first",
                dashes: "",
                points: points(|e| e.train_loss, 1.0),
            },
            Line {
                name: "validation",
                class: "second",
                dashes: "dashed",
                points: points(|e| e.val_loss, 1.0),
            },
        ];
        let accuracy = [
            Line {
                name: "training",
                class: "first",
                dashes: "",
                points: points(|e| e.train_accuracy, 100.0),
            },
            Line {
                name: "validation",
                class: "second",
                dashes: "dashed",
                points: points(|e| e.val_accuracy, 100.0),
            },
            Line {
                name: "validation macro-F1",
                class: "third",
                dashes: "dotted",
                points: points(|e| e.val_macro_f1, 100.0),
            },
        ];
        html! {
            section {
                h2 { "Curves" }
                p.note {
                    "One point an epoch; training figures are of images as they were augmented."
                    @if let Some(epoch) = self.epoch { " The vertical line is epoch " (epoch) ", which this page is about." }
                }
                div.pair {
                    (charts::lines("Loss", "epoch", "nats", &loss, best))
                    (charts::lines("Accuracy", "epoch", "%", &accuracy, best))
                }
            }
        }
    }

    fn matrix(&self) -> Result<Markup, ReportError> {
        let met = met_classes(self.evaluation());
        if met.len() > MATRIX_CLASSES {
            let png = confusion_matrix(self.evaluation(), self.judgement.labels)?;
            let alt = "Confusion matrix as a picture";
            return Ok(html! {
                section {
                    h2 { "Confusions" }
                    p.note { "Rows are true classes, columns the names given, in the order of the classes. The stronger the colour, the larger the share of its row." }
                    img.picture alt=(alt) width=(png.width / 2) height=(png.height / 2) src=(super::data_uri("image/png", &png.png()?));
                    (self.most_confused())
                }
            });
        }
        let named = self.evaluation().named();
        let count = |row: usize, column: usize| named.get(&(row, column)).copied().unwrap_or(0);
        let labels = self.judgement.labels;
        Ok(html! {
            section {
                h2 { "Confusion matrix" }
                p.note { "Images of each true class (rows) by the name given (columns). The stronger the colour, the larger the share of its row." }
                div.scroll tabindex="0" role="region" aria-label="Confusion matrix" {
                    table.matrix {
                        thead { tr {
                            th.axis scope="col" { "true \\ named" }
                            @for &column in &met { th.name scope="col" { span { (labels[column]) } } }
                        } }
                        tbody {
                            @for &row in &met {
                                @let all: u64 = met.iter().map(|&column| count(row, column)).sum();
                                tr {
                                    th scope="row" { (labels[row]) }
                                    @for &column in &met { (cell(count(row, column), all, row == column)) }
                                }
                            }
                        }
                    }
                }
            }
        })
    }

    fn most_confused(&self) -> Markup {
        let mut wrong: Vec<((usize, usize), u64)> = self.evaluation().named().into_iter().collect();
        wrong.retain(|((label, named), _)| label != named);
        wrong.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        wrong.truncate(CONFUSIONS);
        let classes = self.evaluation().classes();
        html! {
            @if !wrong.is_empty() {
                div.scroll tabindex="0" role="region" aria-label="Most often confused" {
                    table.rows {
                        thead { tr { th { "true class" } th { "taken for" } th { "times" } th { "of" } } }
                        tbody {
                            @for ((label, named), count) in wrong {
                                tr {
                                    td { (self.judgement.labels[label]) }
                                    td { (self.judgement.labels[named]) }
                                    td { (count) }
                                    td { (classes[label].support) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    fn sureness(&self) -> Markup {
        let reliability = self.evaluation().reliability();
        html! {
            section {
                h2 { "Can its probabilities be believed?" }
                p.note {
                    "Where bars meet the diagonal, what is named with 80 % is right in 80 % of cases. Expected calibration error "
                    (percent(reliability.error())) " over 15 bins of equal width, at temperature "
                    (format!("{:.3}", self.judgement.temperature)) "."
                    @if let Some(c) = &self.judgement.calibration {
                        " Calibrated: the temperature was " (format!("{:.3}", c.temperature_before))
                        ", the error " (percent(c.calibration_error_before))
                        ", the loss " (format!("{:.4}", c.loss_before)) "."
                    }
                }
                div.single { (charts::reliability(reliability)) }
            }
        }
    }

    fn classes(&self) -> Markup {
        let classes = self.evaluation().classes();
        let mut rows: Vec<(&String, &ClassMetrics)> =
            self.judgement.labels.iter().zip(&classes).collect();
        rows.retain(|(_, class)| class.support > 0);
        let all = rows.len();
        if all > ROWS {
            rows.sort_by(|(_, a), (_, b)| a.f1.total_cmp(&b.f1));
            rows.truncate(ROWS);
        }
        html! {
            section {
                h2 { "Classes" }
                p.note {
                    "Precision: of the images given this name, those that deserve it. Recall: of its images, those given the name. Specificity: of other images, those not given it. F1: the harmonic mean of the first two."
                    @if rows.len() < all { " The " (rows.len()) " lowest F1 of " (all) " classes." }
                }
                div.scroll tabindex="0" role="region" aria-label="Classes" {
                    table.rows {
                        thead { tr {
                            th scope="col" { "class" } th scope="col" { "images" } th scope="col" { "precision" }
                            th scope="col" { "recall" } th scope="col" { "specificity" } th scope="col" { "F1" }
                        } }
                        tbody {
                            @for (label, class) in rows {
                                tr {
                                    td { (label) } td { (class.support) } td { (percent(class.precision)) }
                                    td { (percent(class.recall)) } td { (percent(class.specificity)) }
                                    td { (percent(class.f1)) span.meter { i style={ "width:" (format!("{:.0}", 100.0 * class.f1)) "%" } {} } }
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    fn mistakes(&self) -> Markup {
        let mistakes = self.evaluation().mistakes();
        let shown = &mistakes[..mistakes.len().min(MISTAKES)];
        html! {
            section {
                h2 { "Worst mistakes" }
                @if mistakes.is_empty() {
                    p.note { "None: every image was named rightly." }
                } @else {
                    p.note {
                        "Those whose true class was thought least probable"
                        @if shown.len() < mistakes.len() { ", " (shown.len()) " of " (mistakes.len()) }
                        "."
                    }
                    div.shots {
                        @for mistake in shown {
                            (self.shot(mistake, html! {
                                "said " span.bad { (self.label(mistake.named)) } " " (percent(mistake.named_probability.into()))
                                br;
                                "is " b { (self.label(mistake.label)) } " " (percent(mistake.label_probability.into()))
                            }))
                        }
                    }
                }
            }
        }
    }

    /// The surest right answer of each class, of some classes where these are many.
    fn right(&self) -> Markup {
        let mut surest: Vec<Option<&Verdict>> = vec![None; self.judgement.labels.len()];
        for verdict in self.evaluation().verdicts().iter().filter(|v| v.is_right()) {
            let held = &mut surest[verdict.label as usize];
            if held.is_none_or(|h| verdict.named_probability > h.named_probability) {
                *held = Some(verdict);
            }
        }
        let surest: Vec<&Verdict> = surest.into_iter().flatten().collect();
        let count = surest.len().min(RIGHT);
        let shown: Vec<&Verdict> = (0..count)
            .map(|i| surest[i * surest.len() / count])
            .collect();
        html! {
            @if !shown.is_empty() {
                section {
                    h2 { "Rightly named" }
                    p.note { "The surest of each class" @if count < surest.len() { ", of some classes" } "." }
                    div.shots {
                        @for verdict in shown {
                            (self.shot(verdict, html! {
                                span.good { (self.label(verdict.named)) } " " (percent(verdict.named_probability.into()))
                            }))
                        }
                    }
                }
            }
        }
    }

    fn shot(&self, verdict: &Verdict, caption: Markup) -> Markup {
        let picture = &self.judgement.samples[verdict.sample as usize].picture;
        let name = picture.name();
        let file = name.rsplit(['/', '\\']).next().unwrap_or(&name);
        html! {
            figure {
                div.frame {
                    @match thumbnail(picture, &self.decoder) {
                        Some(image) => img.small[image.small] alt=(file) src=(image.uri);,
                        None => "cannot be read",
                    }
                }
                figcaption { (caption) br; small { (file) } }
            }
        }
    }

    fn balance(&self) -> Markup {
        let (first, second): (&[usize], Option<&[usize]>) = match &self.balance {
            Balance::Judged(counts) => (counts, None),
            Balance::Divided { train, validation } => (train, Some(validation)),
        };
        let total = |class: usize| first[class] + second.map_or(0, |s| s[class]);
        let mut classes: Vec<usize> = (0..first.len()).filter(|&c| total(c) > 0).collect();
        let all = classes.len();
        if all > BARS {
            classes.sort_by_key(|&class| std::cmp::Reverse(total(class)));
            classes.drain(BARS / 2..all - BARS / 2);
        }
        let most = classes.iter().map(|&c| total(c)).max().unwrap_or(1) as f64;
        let share = |count: usize| format!("width:{:.2}%", 100.0 * count as f64 / most);
        html! {
            section {
                h2 { "Class balance" }
                p.note {
                    "Images of each class"
                    @if second.is_some() {
                        ": " span.swatch {} "to train on, " span.swatch.two {} "to validate on"
                    }
                    "."
                    @if classes.len() < all { " The " (BARS / 2) " largest and the " (BARS / 2) " smallest of " (all) " classes." }
                }
                div.bars {
                    @for &class in &classes {
                        span.name { (self.judgement.labels[class]) }
                        span.track {
                            i style=(share(first[class])) {}
                            @if let Some(second) = second { i style=(share(second[class])) {} }
                        }
                        span { (first[class]) @if let Some(second) = second { " + " (second[class]) } }
                    }
                }
            }
        }
    }

    fn speed(&self) -> Markup {
        let trained: Vec<&Epoch> = self
            .epochs
            .iter()
            .filter(|e| e.images_per_second.is_some())
            .collect();
        html! {
            section {
                h2 { "Time and speed" }
                @if let [.., last] = trained.as_slice() {
                    p.note { (duration(self.seconds)) " in all. Images a second are those trained on, validation not counted; seconds are of the epoch with its validation." }
                    div.scroll tabindex="0" role="region" aria-label="Epochs" {
                        table.rows {
                            thead { tr {
                                th scope="col" { "epoch" } th scope="col" { "seconds" } th scope="col" { "images/s" } th scope="col" { "learning rate" }
                                th scope="col" { "validation accuracy" }
                            } }
                            tbody {
                                @for epoch in shown_epochs(&trained, last) {
                                    tr {
                                        td { (epoch.epoch) }
                                        td { (number(epoch.seconds, |s| format!("{s:.1}"))) }
                                        td { (number(epoch.images_per_second, |s| format!("{s:.0}"))) }
                                        td { (number(epoch.learning_rate, |s| format!("{s:.1e}"))) }
                                        td { (number(epoch.val_accuracy, percent)) }
                                    }
                                }
                            }
                        }
                    }
                } @else {
                    p {
                        (self.evaluation().images()) " images in " (duration(self.seconds)) ", "
                        (format!("{:.1}", self.evaluation().images() as f64 / self.seconds.max(1e-9))) " a second, loading included."
                    }
                }
            }
        }
    }

    fn settings(&self) -> Markup {
        html! {
            @if !self.settings.is_empty() {
                section {
                    h2 { "Settings" }
                    dl.settings {
                        @for (name, value) in &self.settings { div { dt { (name) } dd { (value) } } }
                    }
                }
            }
        }
    }
}

fn cell(count: u64, all: u64, right: bool) -> Markup {
    if count == 0 {
        return html! { td.none { "0" } };
    }
    let share = count as f64 / all.max(1) as f64;
    let depth = format!("--v:{:.2}", 0.12 + 0.88 * share);
    html! { td.deep[share > 0.5].right[right] style=(depth) { (count) } }
}

/// All epochs, or where they are many every so manieth and the last.
fn shown_epochs<'a>(epochs: &[&'a Epoch], last: &&'a Epoch) -> Vec<&'a Epoch> {
    const MOST: usize = 20;
    let step = epochs.len().div_ceil(MOST);
    let mut shown: Vec<&Epoch> = epochs.iter().copied().step_by(step).collect();
    if shown.last().is_some_and(|shown| shown.epoch != last.epoch) {
        shown.push(last);
    }
    shown
}

fn number(value: Option<f64>, text: impl Fn(f64) -> String) -> String {
    value.map_or("-".into(), text)
}

/// `3 h 5 min`, `2 min 3 s`, `4.2 s`
fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}
