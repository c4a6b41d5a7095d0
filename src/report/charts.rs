//! Charts as SVG inside a page, in the page's colours.

use maud::{Markup, html};

use crate::train::Reliability;

/// A line of a chart.
pub struct Line<'a> {
    pub name: &'a str,
    /// The colour: `first`, `second` or `third`.
    pub class: &'a str,
    /// Empty, `dashed` or `dotted`.
    pub dashes: &'a str,
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 270.0;
/// The inside of the axes.
const LEFT: f64 = 52.0;
const RIGHT: f64 = WIDTH - 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = HEIGHT - 44.0;

/// A range of values along an axis.
struct Scale {
    low: f64,
    high: f64,
    ticks: Vec<f64>,
    /// Digits behind the point.
    digits: usize,
}

impl Scale {
    /// Round numbers around the values.
    fn around(values: impl Iterator<Item = f64> + Clone, whole: bool) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = match (low.is_finite() && high.is_finite(), high > low) {
            (false, _) => (0.0, 1.0),
            (true, false) => (low - 0.5, high + 0.5),
            (true, true) => (low, high),
        };
        let rough: f64 = (high - low) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
        let mut step = steps
            .into_iter()
            .find(|&s| s >= rough * 0.999)
            .unwrap_or(rough);
        if whole {
            step = step.max(1.0).round();
        }
        let (low, high) = if whole {
            (low, high)
        } else {
            ((low / step).floor() * step, (high / step).ceil() * step)
        };
        let first = (low / step).ceil() as i64;
        let last = (high / step + 1e-9).floor() as i64;
        Self {
            low,
            high,
            ticks: (first..=last).map(|i| i as f64 * step).collect(),
            digits: (-step.log10().floor()).clamp(0.0, 6.0) as usize,
        }
    }

    fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + self.share(value) * (RIGHT - LEFT)
    }

    fn y(&self, value: f64) -> f64 {
        BOTTOM - self.share(value) * (BOTTOM - TOP)
    }

    fn label(&self, tick: f64) -> String {
        format!("{tick:.*}", self.digits)
    }
}

/// Lines over whole numbers, with a vertical line at `mark`.
pub fn lines(title: &str, x_name: &str, y_name: &str, lines: &[Line], mark: Option<f64>) -> Markup {
    let points = lines.iter().flat_map(|line| &line.points);
    let x = Scale::around(points.clone().map(|p| p.0), true);
    let y = Scale::around(points.map(|p| p.1), false);
    let few = lines.iter().all(|line| line.points.len() <= 30);
    let label = format!("{title} by {x_name}");
    html! {
        div {
            b { (title) }
            div.key {
                @for line in lines.iter().filter(|l| !l.points.is_empty()) {
                    span {
                        svg.chart viewBox="0 0 26 10" aria-hidden="true" {
                            path class={ (line.class) " " (line.dashes) } d="M1 5H25" {}
                        }
                        (line.name)
                    }
                }
            }
            svg.chart viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label=(label) {
                (axes(&x, &y, x_name, y_name))
                @if let Some(mark) = mark.filter(|&m| m >= x.low && m <= x.high) {
                    line.best x1=(at(x.x(mark))) x2=(at(x.x(mark))) y1=(at(TOP)) y2=(at(BOTTOM)) {}
                }
                @for line in lines {
                    path class={ (line.class) " " (line.dashes) } d=(path(&line.points, &x, &y)) {}
                    @if few {
                        @for &(px, py) in &line.points {
                            circle class=(line.class) cx=(at(x.x(px))) cy=(at(y.y(py))) r="3" {
                                title { (line.name) ", " (x_name) " " (px) ": " (format!("{py:.4}")) " " (y_name) }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// How often images were named rightly, by the probability with which they were named.
pub fn reliability(reliability: &Reliability) -> Markup {
    let unit = || Scale {
        low: 0.0,
        high: 100.0,
        ticks: (0..=5).map(|i| f64::from(i) * 20.0).collect(),
        digits: 0,
    };
    let (x, y) = (unit(), unit());
    let bins = reliability.bins();
    let width = 100.0 / bins.len() as f64;
    html! {
        svg.chart viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label="Share named rightly by probability" {
            (axes(&x, &y, "probability of the name given (%)", "named rightly (%)"))
            @for (i, bin) in bins.iter().enumerate().filter(|(_, bin)| bin.images > 0) {
                @let right = 100.0 * bin.right as f64 / bin.images as f64;
                @let left = x.x(i as f64 * width);
                // Bars of no height should be seen too.
                @let top = y.y(right).min(BOTTOM - 1.5);
                rect.bar x=(at(left + 1.0)) y=(at(top)) width=(at(x.x(width) - x.x(0.0) - 2.0)) height=(at(BOTTOM - top)) {
                    title { (bin.right) " of " (bin.images) " named rightly, mean probability " (format!("{:.1} %", 100.0 * bin.probability / bin.images as f64)) }
                }
            }
            line.axis.dashed x1=(at(x.x(0.0))) y1=(at(y.y(0.0))) x2=(at(x.x(100.0))) y2=(at(y.y(100.0))) {}
        }
    }
}

fn axes(x: &Scale, y: &Scale, x_name: &str, y_name: &str) -> Markup {
    let middle = (TOP + BOTTOM) / 2.0;
    html! {
        @for &tick in &y.ticks {
            line.grid x1=(at(LEFT)) x2=(at(RIGHT)) y1=(at(y.y(tick))) y2=(at(y.y(tick))) {}
            text x=(at(LEFT - 7.0)) y=(at(y.y(tick) + 4.0)) text-anchor="end" { (y.label(tick)) }
        }
        @for &tick in &x.ticks {
            text x=(at(x.x(tick))) y=(at(BOTTOM + 17.0)) text-anchor="middle" { (x.label(tick)) }
        }
        line.axis x1=(at(LEFT)) x2=(at(RIGHT)) y1=(at(BOTTOM)) y2=(at(BOTTOM)) {}
        text x=(at((LEFT + RIGHT) / 2.0)) y=(at(HEIGHT - 8.0)) text-anchor="middle" { (x_name) }
        text x="12" y=(at(middle)) text-anchor="middle" transform={ "rotate(-90 12 " (at(middle)) ")" } { (y_name) }
    }
}

fn path(points: &[(f64, f64)], x: &Scale, y: &Scale) -> String {
    let mut path = String::new();
    for (i, &(px, py)) in points.iter().enumerate() {
        let command = if i == 0 { 'M' } else { 'L' };
        path += &format!("{command}{} {}", at(x.x(px)), at(y.y(py)));
    }
    path
}

/// A coordinate.
fn at(value: f64) -> String {
    format!("{value:.1}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_hold_all_values() {
        for (values, whole, ticks) in [
            (vec![0.31, 1.74], false, vec![0.0, 0.5, 1.0, 1.5, 2.0]),
            (vec![1.0, 10.0], true, vec![2.0, 4.0, 6.0, 8.0, 10.0]),
            (vec![0.0, 3.0], true, vec![0.0, 1.0, 2.0, 3.0]),
            (
                vec![97.0, 99.1],
                false,
                vec![97.0, 97.5, 98.0, 98.5, 99.0, 99.5],
            ),
            (vec![], false, vec![0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ] {
            let scale = Scale::around(values.iter().copied(), whole);
            assert_eq!(
                scale.ticks.len(),
                ticks.len(),
                "{values:?}: {:?}",
                scale.ticks
            );
            for (found, expected) in scale.ticks.iter().zip(ticks) {
                assert!((found - expected).abs() < 1e-9, "{:?}", scale.ticks);
            }
            assert!(values.iter().all(|&v| v >= scale.low && v <= scale.high));
        }
        let one = Scale::around([5.0].into_iter(), false);
        assert!(one.low < 5.0 && one.high > 5.0);
    }
}
