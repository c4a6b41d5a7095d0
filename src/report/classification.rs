//! Results of `classify`: text for people; JSON, JSON lines and CSV for programs.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use serde::Serialize;

/// `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    /// One array.
    Json,
    /// An object a line.
    JsonLines,
    Csv,
}

/// What was found out about one input.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    pub path: String,
    #[serde(flatten)]
    pub outcome: Outcome,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Outcome {
    Classified(Prediction),
    Failed { error: String },
}

impl Record {
    pub fn new(path: String, result: Result<Prediction, String>) -> Self {
        let outcome = match result {
            Ok(prediction) => Outcome::Classified(prediction),
            Err(error) => Outcome::Failed { error },
        };
        Self { path, outcome }
    }
}

/// The classes of one picture, the most probable first.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// Of the picture, in pixels.
    pub width: usize,
    pub height: usize,
    pub top: Vec<Ranked>,
    /// In class order, before temperature.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logits: Option<Vec<f32>>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ranked {
    pub index: usize,
    pub label: String,
    /// In [0, 1].
    pub probability: f64,
}

/// How logits become a ranked list.
#[derive(Clone, Copy, Debug)]
pub struct Ranking {
    /// At most so many classes.
    pub top_k: usize,
    /// Logits are divided by it before softmax.
    pub temperature: f64,
    /// Classes below are left out.
    pub min_probability: f64,
}

impl Ranking {
    /// Softmax, then the most probable classes; equal ones in class order.
    pub fn rank(&self, logits: &[f32], labels: &[String]) -> Vec<Ranked> {
        let scaled: Vec<f64> = logits
            .iter()
            .map(|&l| f64::from(l) / self.temperature)
            .collect();
        let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scaled.iter().map(|l| (l - max).exp()).sum();
        let mut order: Vec<usize> = (0..scaled.len()).collect();
        order.sort_by(|&a, &b| scaled[b].total_cmp(&scaled[a]));
        order
            .into_iter()
            .take(self.top_k)
            .map(|index| Ranked {
                index,
                label: labels[index].clone(),
                probability: (scaled[index] - max).exp() / total,
            })
            .filter(|ranked| ranked.probability >= self.min_probability)
            .collect()
    }
}

/// Writes records as they come.
pub struct Writer<W: Write> {
    out: W,
    format: Format,
    written: usize,
}

/// Length of a bar that stands for certainty, in characters.
const BAR: usize = 20;

impl<W: Write> Writer<W> {
    /// Starts a document.
    ///
    /// # Errors
    /// Where `out` fails; likewise below.
    pub fn new(mut out: W, format: Format) -> io::Result<Self> {
        if format == Format::Csv {
            csv_row(
                &mut out,
                &["path", "rank", "index", "label", "probability", "error"],
            )?;
        }
        Ok(Self {
            out,
            format,
            written: 0,
        })
    }

    /// Adds a record and hands it on at once.
    pub fn write(&mut self, record: &Record) -> io::Result<()> {
        match self.format {
            Format::Text => self.text(record)?,
            Format::Json => {
                let before = if self.written == 0 { "[\n" } else { ",\n" };
                self.out.write_all(before.as_bytes())?;
                serde_json::to_writer(&mut self.out, record)?;
            }
            Format::JsonLines => {
                serde_json::to_writer(&mut self.out, record)?;
                self.out.write_all(b"\n")?;
            }
            Format::Csv => self.csv(record)?,
        }
        self.written += 1;
        self.out.flush()
    }

    /// Ends the document.
    pub fn finish(mut self) -> io::Result<()> {
        if self.format == Format::Json {
            let end = if self.written == 0 { "[]\n" } else { "\n]\n" };
            self.out.write_all(end.as_bytes())?;
        }
        self.out.flush()
    }

    fn text(&mut self, record: &Record) -> io::Result<()> {
        // Errors go to standard error; they are the command's to print.
        let Outcome::Classified(prediction) = &record.outcome else {
            return Ok(());
        };
        let (bold, dim) = (Style::new().bold(), Style::new().dimmed());
        let green = AnsiColor::Green.on_default();
        if self.written > 0 {
            writeln!(self.out)?;
        }
        let Prediction { width, height, .. } = prediction;
        writeln!(
            self.out,
            "{bold}{}{bold:#}  {dim}{width} x {height}{dim:#}",
            record.path
        )?;
        for (rank, ranked) in prediction.top.iter().enumerate() {
            let style = if rank == 0 { green } else { Style::new() };
            let percent = ranked.probability * 100.0;
            let bar = bar(ranked.probability);
            writeln!(
                self.out,
                "  {percent:5.1} %  {style}{bar:BAR$}{style:#}  {style}{}{style:#}",
                ranked.label
            )?;
        }
        if prediction.top.is_empty() {
            writeln!(self.out, "  {dim}no class is probable enough{dim:#}")?;
        }
        if let Some(logits) = &prediction.logits {
            let values: Vec<String> = logits.iter().map(f32::to_string).collect();
            writeln!(self.out, "  {dim}logits{dim:#} {}", values.join(" "))?;
        }
        Ok(())
    }

    fn csv(&mut self, record: &Record) -> io::Result<()> {
        match &record.outcome {
            Outcome::Classified(prediction) => {
                for (rank, ranked) in prediction.top.iter().enumerate() {
                    let rank = (rank + 1).to_string();
                    let index = ranked.index.to_string();
                    let probability = ranked.probability.to_string();
                    let row = [&record.path, &rank, &index, &ranked.label, &probability, ""];
                    csv_row(&mut self.out, &row)?;
                }
                Ok(())
            }
            Outcome::Failed { error } => {
                csv_row(&mut self.out, &[&record.path, "", "", "", "", error])
            }
        }
    }
}

fn csv_row(out: &mut impl Write, fields: &[&str]) -> io::Result<()> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(fields)?;
    let row = writer
        .into_inner()
        .map_err(|e| io::Error::other(e.to_string()))?;
    out.write_all(&row)
}

/// A bar in eighths of a character.
fn bar(fraction: f64) -> String {
    let eighths = (fraction * (BAR * 8) as f64).round() as usize;
    let mut bar = "█".repeat(eighths / 8);
    bar.extend(['▏', '▎', '▍', '▌', '▋', '▊', '▉'].get((eighths % 8).wrapping_sub(1)));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> [Record; 2] {
        let top = vec![
            Ranked {
                index: 1,
                label: "cup, \"big\"".into(),
                probability: 0.75,
            },
            Ranked {
                index: 0,
                label: "spoon".into(),
                probability: 0.25,
            },
        ];
        let prediction = Prediction {
            width: 4,
            height: 3,
            top,
            logits: None,
        };
        [
            Record::new("a,b.png".into(), Ok(prediction)),
            Record::new("c.png".into(), Err("broken".into())),
        ]
    }

    fn written(format: Format, records: &[Record]) -> String {
        let mut out = Vec::new();
        let mut writer = Writer::new(&mut out, format).unwrap();
        records.iter().for_each(|r| writer.write(r).unwrap());
        writer.finish().unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn csv_quotes_what_needs_it_and_carries_errors() {
        let expected = "path,rank,index,label,probability,error\n\
            \"a,b.png\",1,1,\"cup, \"\"big\"\"\",0.75,\n\
            \"a,b.png\",2,0,spoon,0.25,\n\
            c.png,,,,,broken\n";
        assert_eq!(written(Format::Csv, &records()), expected);
    }

    #[test]
    fn json_lines_follow_the_contract() {
        let text = written(Format::JsonLines, &records());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            r#"{"path":"a,b.png","width":4,"height":3,"top":[{"index":1,"label":"cup, \"big\"","probability":0.75},{"index":0,"label":"spoon","probability":0.25}]}"#
        );
        assert_eq!(lines[1], r#"{"path":"c.png","error":"broken"}"#);
    }

    #[test]
    fn json_is_one_array_also_of_nothing() {
        let all: serde_json::Value =
            serde_json::from_str(&written(Format::Json, &records())).unwrap();
        assert_eq!(all.as_array().unwrap().len(), 2);
        assert_eq!(written(Format::Json, &[]), "[]\n");
    }

    #[test]
    fn ranking_is_softmax_at_a_temperature() {
        let labels: Vec<String> = ["a", "b", "c"].map(String::from).to_vec();
        let ranking = Ranking {
            top_k: 2,
            temperature: 2.0,
            min_probability: 0.0,
        };
        let top = ranking.rank(&[0.0, 4.0, 2.0], &labels);
        let total = 1.0 + 2f64.exp() + 1f64.exp();
        assert_eq!((top.len(), top[0].label.as_str()), (2, "b"));
        assert!((top[0].probability - 2f64.exp() / total).abs() < 1e-12);
        assert!((top[1].probability - 1f64.exp() / total).abs() < 1e-12);
    }

    #[test]
    fn bars_grow_in_eighths() {
        assert_eq!(bar(0.0), "");
        assert_eq!(bar(1.0), "█".repeat(BAR));
        assert_eq!(bar(1.5 / BAR as f64), "█▌");
    }
}
