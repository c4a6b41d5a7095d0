//! Weight tensors as text: statistics with small bars, and how two networks differ.

use std::io::{self, Write};

use anstyle::Style;

use crate::explain::{Difference, Kernel};

const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A row a tensor.
///
/// # Errors
/// Where `out` fails.
pub fn write_kernels(name: &str, kernels: &[Kernel], out: &mut impl Write) -> io::Result<()> {
    let (bold, dim) = (Style::new().bold(), Style::new().dimmed());
    let shapes: Vec<String> = kernels.iter().map(|k| shape(&k.shape)).collect();
    let names = longest(kernels.iter().map(|k| k.name.as_str()), "tensor");
    let sizes = longest(shapes.iter().map(String::as_str), "shape");
    writeln!(out, "{bold}{name}{bold:#}: {} tensors\n", kernels.len())?;
    writeln!(
        out,
        "{bold}{:names$}  {:>sizes$}  {:>10}  {:>10}  {:>10}  {:>10}  {:>7}  from min to max{bold:#}",
        "tensor", "shape", "mean", "std", "min", "max", "zeros"
    )?;
    for (kernel, shape) in kernels.iter().zip(shapes) {
        let s = &kernel.statistics;
        let std = s.std.map_or(String::from("-"), number);
        writeln!(
            out,
            "{:names$}  {shape:>sizes$}  {:>10}  {std:>10}  {:>10}  {:>10}  {:>7}  {dim}{}{dim:#}",
            kernel.name,
            number(s.mean),
            number(s.min.into()),
            number(s.max.into()),
            super::percent(s.sparsity),
            bars(&s.histogram.counts),
        )?;
    }
    Ok(())
}

/// A row a tensor that both networks have, those that changed most first; then what only one has.
///
/// # Errors
/// Where `out` fails.
pub fn write_differences(
    [before, after]: [&str; 2],
    differences: &[Difference],
    others: &[String],
    out: &mut impl Write,
) -> io::Result<()> {
    let bold = Style::new().bold();
    let mut sorted: Vec<&Difference> = differences.iter().collect();
    sorted.sort_by(|a, b| b.relative.total_cmp(&a.relative));
    let shapes: Vec<String> = sorted.iter().map(|d| shape(&d.shape)).collect();
    let names = longest(sorted.iter().map(|d| d.name.as_str()), "tensor");
    let sizes = longest(shapes.iter().map(String::as_str), "shape");
    writeln!(out, "{bold}{before}{bold:#} to {bold}{after}{bold:#}\n")?;
    writeln!(
        out,
        "{bold}{:names$}  {:>sizes$}  {:>9}  {:>10}  {:>8}{bold:#}",
        "tensor", "shape", "moved", "largest", "cosine"
    )?;
    for (d, shape) in sorted.iter().zip(shapes) {
        writeln!(
            out,
            "{:names$}  {shape:>sizes$}  {:>9}  {:>10}  {:>8.5}",
            d.name,
            super::percent(d.relative),
            number(d.largest.into()),
            d.cosine
        )?;
    }
    if !others.is_empty() {
        writeln!(
            out,
            "\nonly in one, or of another shape: {}",
            others.join(", ")
        )?;
    }
    Ok(())
}

fn longest<'a>(texts: impl Iterator<Item = &'a str>, title: &str) -> usize {
    texts.map(str::len).max().unwrap_or(0).max(title.len())
}

fn shape(shape: &[usize]) -> String {
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    sizes.join(" x ")
}

/// Four digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if (1e-3..1e4).contains(&size) => {
            let decimals = (3 - size.log10().floor() as i32).max(0) as usize;
            format!("{value:.decimals$}")
        }
        _ => format!("{value:.3e}"),
    }
}

fn bars(counts: &[u64]) -> String {
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let bar = |&count: &u64| BARS[(count * 8).div_ceil(most) as usize];
    counts.iter().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_four_digits() {
        let shown = [0.0, 1.23456, -0.0123456, 123.456, 1e-7, -12345.6].map(number);
        assert_eq!(
            shown,
            ["0", "1.235", "-0.01235", "123.5", "1.000e-7", "-1.235e4"]
        );
    }

    #[test]
    fn what_is_there_shows() {
        assert_eq!(bars(&[0, 1, 1000]), " ▁█");
    }
}
