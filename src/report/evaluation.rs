//! How well a network names images: text for people, JSON and CSV for programs.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use serde::Serialize;
use serde::ser::{SerializeSeq, Serializer};

use super::percent;
use crate::data::Sample;
use crate::train::{ClassMetrics, Evaluation, Verdict};

/// What an evaluation is about.
#[derive(Clone, Copy)]
pub struct Judgement<'a> {
    pub evaluation: &'a Evaluation,
    /// Names of the network's classes.
    pub labels: &'a [String],
    /// The images that were judged, those that could not be read included.
    pub samples: &'a [Sample],
    /// How many could not be read.
    pub unreadable: usize,
    /// What logits were divided by.
    pub temperature: f64,
    pub calibration: Option<Calibration>,
}

/// What a new temperature changed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Calibration {
    pub temperature_before: f64,
    pub temperature: f64,
    pub loss_before: f64,
    pub loss: f64,
    pub calibration_error_before: f64,
    pub calibration_error: f64,
}

#[derive(Serialize)]
struct Json<'a> {
    images: u64,
    accuracy: f64,
    top5: f64,
    macro_f1: f64,
    loss: f64,
    calibration_error: f64,
    temperature: f64,
    unreadable: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    calibration: Option<Calibration>,
    classes: Vec<JsonClass<'a>>,
    #[serde(serialize_with = "rows")]
    confusion: &'a Evaluation,
}

#[derive(Serialize)]
struct JsonClass<'a> {
    label: &'a str,
    #[serde(flatten)]
    metrics: ClassMetrics,
}

fn rows<S: Serializer>(evaluation: &Evaluation, serializer: S) -> Result<S::Ok, S::Error> {
    let mut rows = serializer.serialize_seq(None)?;
    for row in evaluation.confusion() {
        rows.serialize_element(&row)?;
    }
    rows.end()
}

impl Judgement<'_> {
    /// Writes a line of JSON.
    ///
    /// # Errors
    /// Where `out` fails; likewise below.
    pub fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        let evaluation = self.evaluation;
        let classes = self.labels.iter().zip(evaluation.classes());
        let json = Json {
            images: evaluation.images(),
            accuracy: evaluation.accuracy(),
            top5: evaluation.top5(),
            macro_f1: evaluation.macro_f1(),
            loss: evaluation.loss(),
            calibration_error: evaluation.reliability().error(),
            temperature: self.temperature,
            unreadable: self.unreadable,
            calibration: self.calibration,
            classes: classes
                .map(|(label, metrics)| JsonClass { label, metrics })
                .collect(),
            confusion: evaluation,
        };
        serde_json::to_writer(&mut *out, &json)?;
        out.write_all(b"\n")
    }

    /// Writes what a person wants to know first.
    pub fn write_text(&self, out: &mut impl Write) -> io::Result<()> {
        let evaluation = self.evaluation;
        let (bold, dim) = (Style::new().bold(), Style::new().dimmed());
        let green = AnsiColor::Green.on_default();
        let images = evaluation.images();
        let classes = evaluation.classes();
        let there = classes.iter().filter(|class| class.support > 0).count();
        write!(out, "{bold}{}{bold:#}", count(images, "image"))?;
        write!(out, " of {}", count(there as u64, "class"))?;
        if self.unreadable > 0 {
            write!(out, ", {} more could not be read", self.unreadable)?;
        }
        writeln!(out, "\n")?;
        let accuracy = percent(evaluation.accuracy());
        writeln!(out, "accuracy           {green}{accuracy:>8}{green:#}")?;
        writeln!(out, "top-5              {:>8}", percent(evaluation.top5()))?;
        let macro_f1 = percent(evaluation.macro_f1());
        writeln!(out, "macro-F1           {macro_f1:>8}")?;
        writeln!(out, "loss               {:>8.4}", evaluation.loss())?;
        let error = percent(evaluation.reliability().error());
        writeln!(
            out,
            "calibration error  {error:>8}  {dim}expected, 15 bins, at temperature {:.3}{dim:#}",
            self.temperature
        )?;
        if let Some(calibration) = &self.calibration {
            let Calibration {
                temperature_before,
                temperature,
                loss_before,
                loss,
                ..
            } = calibration;
            writeln!(
                out,
                "\n{bold}calibrated{bold:#}: temperature {temperature_before:.3} -> {temperature:.3}, loss {loss_before:.4} -> {loss:.4}, calibration error {} -> {}",
                percent(calibration.calibration_error_before),
                percent(calibration.calibration_error)
            )?;
        }
        writeln!(out)?;
        write_classes(out, self.labels, &classes)?;
        self.write_confusion(out)?;
        self.write_mistakes(out)
    }

    /// The confusion matrix where it is small, else its largest entries off the diagonal.
    fn write_confusion(&self, out: &mut impl Write) -> io::Result<()> {
        let (bold, dim) = (Style::new().bold(), Style::new().dimmed());
        let named = self.evaluation.named();
        let mut met: Vec<usize> = named.keys().flat_map(|&(a, b)| [a, b]).collect();
        met.sort_unstable();
        met.dedup();
        if met.len() <= MATRIX_CLASSES {
            let label = |class: usize| short(&self.labels[class], COLUMN);
            let rows = met.iter().map(|&c| label(c).chars().count()).max();
            let rows = rows.unwrap_or(0);
            writeln!(
                out,
                "\n{bold}confusion{bold:#}  {dim}true classes in rows, named ones in columns{dim:#}"
            )?;
            write!(out, "{:rows$}", "")?;
            for &column in &met {
                write!(out, "  {:>COLUMN$}", label(column))?;
            }
            writeln!(out)?;
            for &row in &met {
                write!(out, "{:rows$}", label(row))?;
                for &column in &met {
                    let count = named.get(&(row, column)).copied().unwrap_or(0);
                    let style = match (count, row == column) {
                        (0, _) => dim,
                        (_, true) => bold,
                        (_, false) => Style::new(),
                    };
                    write!(out, "  {style}{count:>COLUMN$}{style:#}")?;
                }
                writeln!(out)?;
            }
            return Ok(());
        }
        let mut wrong: Vec<((usize, usize), u64)> =
            named.into_iter().filter(|((a, b), _)| a != b).collect();
        if wrong.is_empty() {
            return Ok(());
        }
        wrong.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        wrong.truncate(SHOWN_CONFUSIONS);
        let classes = self.evaluation.classes();
        let lines = wrong.iter().map(|&((label, named), count)| {
            let all = classes[label].support;
            let pair = format!("{} -> {}", self.labels[label], self.labels[named]);
            (pair, count, all)
        });
        let lines: Vec<(String, u64, u64)> = lines.collect();
        let width = lines.iter().map(|(p, ..)| p.chars().count()).max();
        let width = width.unwrap_or(0);
        writeln!(
            out,
            "\n{bold}most often confused{bold:#}  {dim}truth -> name given{dim:#}"
        )?;
        for (pair, count, all) in lines {
            writeln!(out, "{pair:width$}  {count:>5} {dim}of {all}{dim:#}")?;
        }
        Ok(())
    }

    fn write_mistakes(&self, out: &mut impl Write) -> io::Result<()> {
        let (bold, dim) = (Style::new().bold(), Style::new().dimmed());
        let mistakes = self.evaluation.mistakes();
        if mistakes.is_empty() {
            return Ok(());
        }
        let shown = mistakes.len().min(SHOWN_MISTAKES);
        let of = if shown < mistakes.len() {
            format!("  {dim}{shown} of {}{dim:#}", mistakes.len())
        } else {
            String::new()
        };
        writeln!(out, "\n{bold}worst mistakes{bold:#}{of}")?;
        for mistake in &mistakes[..shown] {
            writeln!(
                out,
                "{}  {dim}is{dim:#} {} {dim}({}), taken for{dim:#} {} {dim}({}){dim:#}",
                self.name(mistake),
                self.labels[mistake.label as usize],
                percent(mistake.label_probability.into()),
                self.labels[mistake.named as usize],
                percent(mistake.named_probability.into()),
            )?;
        }
        Ok(())
    }

    /// Writes every mistake as CSV, the least expected truth first.
    pub fn write_mistakes_csv(&self, out: impl Write) -> csv::Result<()> {
        let mut csv = csv::Writer::from_writer(out);
        csv.write_record([
            "path",
            "label",
            "predicted",
            "probability",
            "label_probability",
        ])?;
        for mistake in self.evaluation.mistakes() {
            csv.write_record([
                &self.name(&mistake),
                &self.labels[mistake.label as usize],
                &self.labels[mistake.named as usize],
                &mistake.named_probability.to_string(),
                &mistake.label_probability.to_string(),
            ])?;
        }
        Ok(csv.flush()?)
    }

    fn name(&self, verdict: &Verdict) -> String {
        self.samples[verdict.sample as usize].picture.name()
    }
}

/// Classes of a table or a matrix that a person still reads.
const SHOWN_CLASSES: usize = 30;
const MATRIX_CLASSES: usize = 10;
const SHOWN_CONFUSIONS: usize = 10;
const SHOWN_MISTAKES: usize = 10;
/// Width of a matrix's column.
const COLUMN: usize = 10;

/// Writes the table of classes that have images: all of them in their order, or where these are
/// many those with the lowest F1.
///
/// # Errors
/// Where `out` fails.
pub fn write_classes(
    out: &mut impl Write,
    labels: &[String],
    classes: &[ClassMetrics],
) -> io::Result<()> {
    let (bold, dim) = (Style::new().bold(), Style::new().dimmed());
    let mut there: Vec<(&String, &ClassMetrics)> = labels.iter().zip(classes).collect();
    there.retain(|(_, class)| class.support > 0);
    let all = there.len();
    if all > SHOWN_CLASSES {
        there.sort_by(|(_, a), (_, b)| a.f1.total_cmp(&b.f1));
        there.truncate(SHOWN_CLASSES / 2);
    }
    let width = there.iter().map(|(l, _)| l.chars().count()).max();
    let width = width.unwrap_or(0).max("class".len());
    writeln!(
        out,
        "{bold}{:width$}  precision   recall  specificity       F1  images{bold:#}",
        "class"
    )?;
    for (label, class) in &there {
        writeln!(
            out,
            "{label:width$}  {:>9}  {:>7}  {:>11}  {:>7}  {:>6}",
            percent(class.precision),
            percent(class.recall),
            percent(class.specificity),
            percent(class.f1),
            class.support
        )?;
    }
    if there.len() < all {
        writeln!(
            out,
            "{dim}the lowest F1 of {all} classes (--format json has them all){dim:#}"
        )?;
    }
    Ok(())
}

fn count(number: u64, what: &str) -> String {
    match (number, what.ends_with('s')) {
        (1, _) => format!("1 {what}"),
        (_, false) => format!("{number} {what}s"),
        (_, true) => format!("{number} {what}es"),
    }
}

/// At most so many characters.
fn short(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        return text.to_string();
    }
    let kept: String = text.chars().take(length - 1).collect();
    format!("{kept}…")
}
