//! Pictures of what is inside a network: feature maps, activations over a photo, weights.

use plotters::element::{Rectangle, Text};
use plotters::style::text_anchor::{HPos, VPos};
use plotters::style::{BLACK, Color};

use super::plot::{BLUE, GREY, Plot, PlotError, shortened, style, width};
use crate::explain::{FeatureMaps, Kernel, Map};

/// How numbers from 0 to 1 become colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colormap {
    Gray,
    /// matplotlib's, near enough for the eye: perceptually even, and readable without colours.
    Viridis,
    /// Dark to bright through red, for overlays.
    Inferno,
}

/// Colours at equal distances, between which others lie.
const VIRIDIS: [[u8; 3]; 9] = [
    [68, 1, 84],
    [71, 44, 122],
    [59, 81, 139],
    [44, 113, 142],
    [33, 144, 141],
    [39, 173, 129],
    [92, 200, 99],
    [170, 220, 50],
    [253, 231, 37],
];
const INFERNO: [[u8; 3]; 9] = [
    [0, 0, 4],
    [31, 12, 72],
    [85, 15, 109],
    [136, 34, 106],
    [186, 54, 85],
    [227, 89, 51],
    [249, 140, 10],
    [249, 201, 50],
    [252, 255, 164],
];

impl Colormap {
    fn color(self, value: f32) -> [u8; 3] {
        let value = value.clamp(0.0, 1.0);
        let anchors = match self {
            Colormap::Gray => return [(value * 255.0).round() as u8; 3],
            Colormap::Viridis => &VIRIDIS,
            Colormap::Inferno => &INFERNO,
        };
        let at = value * (anchors.len() - 1) as f32;
        let low = (at as usize).min(anchors.len() - 2);
        let along = at - low as f32;
        let mix = |a: u8, b: u8| (f32::from(a) * (1.0 - along) + f32::from(b) * along) as u8;
        let [from, to] = [anchors[low], anchors[low + 1]];
        [0, 1, 2].map(|i| mix(from[i], to[i]))
    }
}

const MARGIN: u32 = 24;
const TITLE: f64 = 24.0;
const SMALL: f64 = 15.0;
/// From the top to what is below a title and a line under it.
const HEADING: u32 = 84;

/// Channels of a node's maps side by side, each from its smallest value to its largest.
///
/// # Errors
/// Where the plot cannot be drawn.
pub fn feature_grid(
    maps: &FeatureMaps,
    channels: &[usize],
    by_energy: bool,
    colormap: Colormap,
) -> Result<Plot, PlotError> {
    const GAP: u32 = 6;
    const NUMBER: u32 = 20;
    // Pixels of a map are shown as squares of several.
    let factor = (112 / maps.width.max(maps.height)).max(1);
    let (w, h) = ((maps.width * factor) as u32, (maps.height * factor) as u32);
    let title = format!(
        "{}   {} x {} x {}",
        maps.name, maps.channels, maps.height, maps.width
    );
    let shown = match (channels.len() == maps.channels, by_energy) {
        (true, false) => format!("all {} channels", maps.channels),
        (true, true) => format!("all {} channels, strongest first", maps.channels),
        (false, false) => format!("channels 0 to {} of {}", channels.len() - 1, maps.channels),
        (false, true) => format!("the {} strongest of {}", channels.len(), maps.channels),
    };
    let count = channels.len() as u32;
    let columns = (1..=count).find(|c| c * (w + GAP) * 3 >= count.div_ceil(*c) * (h + GAP) * 4);
    let columns = columns.unwrap_or(count).max(1);
    let rows = count.div_ceil(columns);
    let inner = (columns * (w + GAP) - GAP).max(width(&title, TITLE) as u32);
    let place = |index: usize| {
        let (row, column) = (index as u32 / columns, index as u32 % columns);
        (
            MARGIN + column * (w + GAP),
            HEADING + row * (h + GAP + NUMBER),
        )
    };
    let bottom = HEADING + rows * (h + GAP + NUMBER) - GAP + MARGIN;
    let mut plot = Plot::draw(inner + 2 * MARGIN, bottom, |area| {
        heading(area, &title, &shown)?;
        for (index, channel) in channels.iter().enumerate() {
            let (x, y) = place(index);
            let under = style(SMALL, &GREY, HPos::Left, VPos::Top);
            let at = (x as i32, (y + h + 3) as i32);
            area.draw(&Text::new(channel.to_string(), at, under))?;
        }
        Ok(())
    })?;
    for (index, &channel) in channels.iter().enumerate() {
        let map = maps.map(channel).normalized();
        let mut pixels = Vec::with_capacity((w * h * 3) as usize);
        for y in 0..h as usize {
            for x in 0..w as usize {
                let value = map.values[y / factor * map.width + x / factor];
                pixels.extend(colormap.color(value));
            }
        }
        plot.place(place(index), [w, h], &pixels);
    }
    Ok(plot)
}

type Area<'a> = super::plot::Area<'a>;
type Drawn<'a> = super::plot::Drawn<'a>;

fn heading<'a>(area: &Area<'a>, title: &str, below: &str) -> Drawn<'a> {
    let left = MARGIN as i32;
    let large = style(TITLE, &BLACK, HPos::Left, VPos::Top);
    area.draw(&Text::new(title.to_string(), (left, 18), large))?;
    let small = style(SMALL, &GREY, HPos::Left, VPos::Top);
    area.draw(&Text::new(below.to_string(), (left, 52), small))
}

/// A photo, and beside it the same under a map of where the network looked.
pub struct Overlay<'a> {
    /// `[side, side, 3]`
    pub photo: &'a [u8],
    pub side: usize,
    pub map: &'a Map,
    /// `espresso  99.2 %`
    pub title: &'a str,
    /// How the map was made.
    pub below: &'a str,
}

impl Overlay<'_> {
    /// # Errors
    /// Where the plot cannot be drawn.
    pub fn plot(&self) -> Result<Plot, PlotError> {
        const GAP: u32 = 12;
        const BAR: u32 = 16;
        const TICKS: u32 = 34;
        let side = self.side as u32;
        let room = 2 * side + 2 * GAP + BAR + TICKS;
        let title = shortened(self.title, TITLE, room as i32);
        let below = shortened(self.below, SMALL, room as i32);
        let bar = MARGIN + 2 * side + 2 * GAP;
        let mut plot = Plot::draw(room + 2 * MARGIN, HEADING + side + MARGIN, |area| {
            heading(area, &title, &below)?;
            for (text, share) in [("1", 0.0), ("0.5", 0.5), ("0", 1.0)] {
                let tick = style(SMALL, &GREY, HPos::Left, VPos::Center);
                let y = HEADING as i32 + 8 + (share * (f64::from(side) - 16.0)) as i32;
                area.draw(&Text::new(text, ((bar + BAR + 6) as i32, y), tick))?;
            }
            Ok(())
        })?;
        let heat = self.map.normalized().resized(self.side);
        let mut over = Vec::with_capacity(self.photo.len());
        for (pixel, &value) in self.photo.as_chunks::<3>().0.iter().zip(&heat.values) {
            let color = Colormap::Inferno.color(value);
            // Where nothing was seen the photo shows through, darker.
            let share = 0.35 + 0.35 * value;
            let mix = |a: u8, b: u8| f32::from(a) * (1.0 - share) + f32::from(b) * share;
            over.extend([0, 1, 2].map(|i| mix(pixel[i], color[i]) as u8));
        }
        let colors = (0..side).flat_map(|y| {
            let value = 1.0 - y as f32 / (side - 1).max(1) as f32;
            [Colormap::Inferno.color(value); BAR as usize]
        });
        let colors: Vec<u8> = colors.flatten().collect();
        plot.place((MARGIN, HEADING), [side, side], self.photo);
        plot.place((MARGIN + side + GAP, HEADING), [side, side], &over);
        plot.place((bar, HEADING), [BAR, side], &colors);
        Ok(plot)
    }
}

/// Plots below each other and side by side.
///
/// # Errors
/// Where the sheet cannot be drawn.
pub fn contact_sheet(plots: &[Plot]) -> Result<Plot, PlotError> {
    let (w, h) = plots
        .iter()
        .fold((1, 1), |(w, h), p| (p.width.max(w), p.height.max(h)));
    let columns = match plots.len() {
        0 | 1 => 1,
        2..=8 => 2,
        _ => 3,
    };
    let rows = (plots.len() as u32).div_ceil(columns);
    let mut sheet = Plot::draw(columns * w, rows.max(1) * h, |_| Ok(()))?;
    for (index, plot) in plots.iter().enumerate() {
        let (row, column) = (index as u32 / columns, index as u32 % columns);
        sheet.place(
            (column * w, row * h),
            [plot.width, plot.height],
            plot.pixels(),
        );
    }
    Ok(sheet)
}

/// Histograms of weight tensors, a small one each.
///
/// # Errors
/// Where the plot cannot be drawn.
pub fn histograms(model: &str, kernels: &[Kernel]) -> Result<Plot, PlotError> {
    const COLUMNS: u32 = 4;
    const W: u32 = 290;
    const H: u32 = 150;
    const BARS: u32 = 84;
    let rows = (kernels.len() as u32).div_ceil(COLUMNS);
    let bottom = HEADING + rows * H + MARGIN / 2;
    Plot::draw(2 * MARGIN + COLUMNS * W, bottom, |area| {
        let title = format!("Weights of {model}");
        heading(
            area,
            &title,
            "values of each tensor from its smallest to its largest; bars are counts",
        )?;
        for (index, kernel) in kernels.iter().enumerate() {
            let (row, column) = (index as u32 / COLUMNS, index as u32 % COLUMNS);
            let (x, y) = (MARGIN + column * W, HEADING + row * H);
            let (left, top) = (x as i32, y as i32);
            let room = (W - 20) as i32;
            let name = shortened(&kernel.name, SMALL, room);
            let dark = style(SMALL, &BLACK, HPos::Left, VPos::Top);
            area.draw(&Text::new(name, (left, top), dark))?;
            let histogram = &kernel.statistics.histogram;
            let most = histogram.counts.iter().copied().max().unwrap_or(1).max(1);
            let bins = histogram.counts.len() as i32;
            let base = top + 22 + BARS as i32;
            let line = [(left, base), (left + room, base + 1)];
            area.draw(&Rectangle::new(line, GREY.mix(0.5).filled()))?;
            for (bin, &count) in histogram.counts.iter().enumerate() {
                let height = (count as f64 / most as f64 * f64::from(BARS)).ceil() as i32;
                let from = left + bin as i32 * room / bins;
                let to = left + (bin as i32 + 1) * room / bins - 1;
                let bar = [(from, base - height), (to, base)];
                if count > 0 {
                    area.draw(&Rectangle::new(bar, BLUE.filled()))?;
                }
            }
            let ends = [
                (histogram.from, HPos::Left, 0),
                (histogram.to, HPos::Right, room),
            ];
            for (value, side, at) in ends {
                let light = style(13.0, &GREY, side, VPos::Top);
                area.draw(&Text::new(
                    format!("{value:.3}"),
                    (left + at, base + 4),
                    light,
                ))?;
            }
        }
        Ok(())
    })
}

/// The filters of a convolution on RGB, `[outputs, 3, height, width]`, as coloured tiles: grey is zero.
///
/// # Errors
/// Where the plot cannot be drawn.
pub fn filters(kernel: &Kernel) -> Result<Plot, PlotError> {
    const GAP: u32 = 6;
    let [count, _, h, w] = kernel.shape[..] else {
        return Err(PlotError::Draw(format!("{} is no filter", kernel.name)));
    };
    let factor = (64 / w.max(h)).max(2);
    let (width_of, height_of) = ((w * factor) as u32, (h * factor) as u32);
    let columns = (count as f64 * 1.6).sqrt().ceil() as u32;
    let rows = (count as u32).div_ceil(columns);
    let title = format!("{}   {count} filters of {h} x {w}", kernel.name);
    let inner = (columns * (width_of + GAP) - GAP).max(width(&title, TITLE) as u32);
    let bottom = HEADING + rows * (height_of + GAP) - GAP + MARGIN;
    let mut plot = Plot::draw(inner + 2 * MARGIN, bottom, |area| {
        heading(
            area,
            &title,
            "red, green and blue weights; grey is zero, each filter to its largest",
        )
    })?;
    let area = h * w;
    for (index, filter) in kernel.values.chunks_exact(3 * area).enumerate() {
        let largest = filter.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
        let mut pixels = Vec::with_capacity(3 * area * factor * factor);
        for y in 0..h * factor {
            for x in 0..w * factor {
                let at = y / factor * w + x / factor;
                let channel = |c: usize| 127.5 + 127.5 * filter[c * area + at] / largest;
                pixels.extend([0, 1, 2].map(|c| channel(c).round() as u8));
            }
        }
        let (row, column) = (index as u32 / columns, index as u32 % columns);
        let place = (
            MARGIN + column * (width_of + GAP),
            HEADING + row * (height_of + GAP),
        );
        plot.place(place, [width_of, height_of], &pixels);
    }
    Ok(plot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_run_from_end_to_end() {
        assert_eq!(Colormap::Viridis.color(-1.0), VIRIDIS[0]);
        assert_eq!(Colormap::Viridis.color(2.0), VIRIDIS[8]);
        assert_eq!(Colormap::Viridis.color(0.5), VIRIDIS[4]);
        assert_eq!(Colormap::Gray.color(1.0), [255; 3]);
    }
}
