//! Plots as PNG.

use std::io::Cursor;
use std::path::Path;
use std::sync::OnceLock;

use image::ImageFormat;
use plotters::backend::BitMapBackend;
use plotters::drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea};
use plotters::element::{Rectangle, Text};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{
    BLACK, Color, FontFamily, FontStyle, FontTransform, IntoFont, RGBColor, TextStyle, WHITE,
    register_font,
};

use crate::train::Evaluation;

/// A picture.
pub struct Plot {
    pub width: u32,
    pub height: u32,
    /// `[height, width, 3]`
    pixels: Vec<u8>,
}

/// Why a plot cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    #[error("a plot cannot be drawn: {0}")]
    Draw(String),
    #[error("a plot cannot be encoded: {0}")]
    Encode(#[from] image::ImageError),
}

static FONT: &[u8] = include_bytes!("../../assets/fonts/Inter.ttf");
const FAMILY: FontFamily = FontFamily::Name("Inter");
pub(super) const BLUE: RGBColor = RGBColor(0x1f, 0x5f, 0xd0);
pub(super) const GREY: RGBColor = RGBColor(0x60, 0x64, 0x6c);
const PALE: RGBColor = RGBColor(0xe4, 0xe6, 0xea);

pub(super) type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;
pub(super) type Drawn<'a> = Result<
    (),
    DrawingAreaErrorKind<<BitMapBackend<'a> as plotters::backend::DrawingBackend>::ErrorType>,
>;

impl Plot {
    pub(super) fn draw(
        width: u32,
        height: u32,
        draw: impl for<'a> FnOnce(&Area<'a>) -> Drawn<'a>,
    ) -> Result<Self, PlotError> {
        static REGISTERED: OnceLock<bool> = OnceLock::new();
        let registered =
            REGISTERED.get_or_init(|| register_font("Inter", FontStyle::Normal, FONT).is_ok());
        if !registered {
            return Err(PlotError::Draw("its font is broken".into()));
        }
        let mut pixels = vec![255; width as usize * height as usize * 3];
        {
            let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
            let drawn = draw(&area).and_then(|()| area.present());
            drawn.map_err(|error| PlotError::Draw(error.to_string()))?;
        }
        Ok(Self {
            width,
            height,
            pixels,
        })
    }

    /// `[height, width, 3]`
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Puts a picture `[height, width, 3]` where it lies wholly inside.
    pub(super) fn place(&mut self, (x, y): (u32, u32), [width, height]: [u32; 2], picture: &[u8]) {
        let own = self.width as usize * 3;
        let line = width as usize * 3;
        for (row, from) in picture.chunks_exact(line).take(height as usize).enumerate() {
            let start = (y as usize + row) * own + x as usize * 3;
            self.pixels[start..start + line].copy_from_slice(from);
        }
    }

    /// The bytes of a PNG file.
    ///
    /// # Errors
    /// Where the encoder refuses.
    pub fn png(&self) -> Result<Vec<u8>, PlotError> {
        let mut out = Cursor::new(Vec::new());
        image::write_buffer_with_format(
            &mut out,
            &self.pixels,
            self.width,
            self.height,
            image::ExtendedColorType::Rgb8,
            ImageFormat::Png,
        )?;
        Ok(out.into_inner())
    }

    /// Writes a PNG file, whole or not at all.
    ///
    /// # Errors
    /// Where that fails.
    pub fn write(&self, path: &Path) -> Result<(), super::ReportError> {
        super::write_file(path, &self.png()?)
    }
}

pub(super) fn style(
    size: f64,
    color: &'static RGBColor,
    horizontal: HPos,
    vertical: VPos,
) -> TextStyle<'static> {
    TextStyle::from((FAMILY, size).into_font())
        .color(color)
        .pos(Pos::new(horizontal, vertical))
}

/// Width of a text, in pixels.
pub(super) fn width(text: &str, size: f64) -> i32 {
    let font = (FAMILY, size).into_font();
    let measured = font
        .layout_box(text)
        .map(|((left, _), (right, _))| right - left);
    // Without its font a text is about half as wide a letter as it is high.
    measured.unwrap_or((text.chars().count() as f64 * size / 2.0) as i32)
}

/// At most so many pixels of a text.
pub(super) fn shortened(text: &str, size: f64, most: i32) -> String {
    if width(text, size) <= most {
        return text.to_string();
    }
    let mut kept: Vec<char> = text.chars().collect();
    while kept.pop().is_some() {
        let short: String = kept.iter().chain(&['…']).collect();
        if width(&short, size) <= most {
            return short;
        }
    }
    String::new()
}

/// Classes that have images or were named: those of a matrix that leaves nothing out.
pub fn met_classes(evaluation: &Evaluation) -> Vec<usize> {
    let mut met: Vec<usize> = evaluation
        .named()
        .keys()
        .flat_map(|&(label, named)| [label, named])
        .collect();
    met.sort_unstable();
    met.dedup();
    met
}

/// Draws the confusion matrix of the classes that are met: true classes in rows, named ones in
/// columns, each row's counts shaded by their share of the row. For screens of two pixels a point.
///
/// # Errors
/// Where drawing fails.
pub fn confusion_matrix(evaluation: &Evaluation, labels: &[String]) -> Result<Plot, PlotError> {
    let met = met_classes(evaluation);
    let named = evaluation.named();
    let count = |row: usize, column: usize| named.get(&(row, column)).copied().unwrap_or(0);
    let classes = met.len().max(1) as i32;
    // Cells that a label still fits beside, else as many pixels as a wide screen has for them.
    let labelled = classes <= 60;
    let cell = match classes {
        ..=12 => 112,
        13..=24 => 80,
        25..=60 => 52,
        _ => (2000 / classes).max(2),
    };
    const LABEL: f64 = 34.0;
    const HEADING: f64 = 48.0;
    const LONGEST: i32 = 440;
    let texts: Vec<String> = met
        .iter()
        .map(|&class| shortened(&labels[class], LABEL, LONGEST))
        .collect();
    let longest = texts.iter().map(|text| width(text, LABEL)).max();
    let beside = if labelled {
        longest.unwrap_or(0) + 28
    } else {
        20
    };
    const TITLE: i32 = 88;
    const MARGIN: i32 = 48;
    let side = cell * classes;
    let left = MARGIN + 68 + beside;
    let top = MARGIN + TITLE + 68 + beside;
    let title = format!(
        "Confusion matrix: accuracy {:.1} % of {} images",
        100.0 * evaluation.accuracy(),
        evaluation.images()
    );
    let right = (left + side).max(MARGIN + width(&title, HEADING)) + MARGIN;
    let bottom = top + side + MARGIN;
    Plot::draw(right as u32, bottom as u32, |area| {
        area.fill(&WHITE)?;
        let start = |size, color| style(size, color, HPos::Left, VPos::Top);
        area.draw(&Text::new(title, (MARGIN, MARGIN), start(HEADING, &BLACK)))?;
        let named_as = style(LABEL, &GREY, HPos::Center, VPos::Top);
        area.draw(&Text::new(
            "named",
            (left + side / 2, MARGIN + TITLE),
            named_as,
        ))?;
        let truth =
            style(LABEL, &GREY, HPos::Center, VPos::Top).transform(FontTransform::Rotate270);
        area.draw(&Text::new("true class", (MARGIN, top + side / 2), truth))?;
        for (row, &label) in met.iter().enumerate() {
            let y = top + row as i32 * cell;
            if labelled {
                let beside = style(LABEL, &BLACK, HPos::Right, VPos::Center);
                area.draw(&Text::new(
                    texts[row].clone(),
                    (left - 20, y + cell / 2),
                    beside,
                ))?;
                let above = style(LABEL, &BLACK, HPos::Left, VPos::Center)
                    .transform(FontTransform::Rotate270);
                let x = left + row as i32 * cell + cell / 2;
                area.draw(&Text::new(texts[row].clone(), (x, top - 20), above))?;
            }
            let all: u64 = met.iter().map(|&column| count(label, column)).sum();
            for (column, &other) in met.iter().enumerate() {
                let x = left + column as i32 * cell;
                let count = count(label, other);
                let share = count as f64 / all.max(1) as f64;
                let gap = if labelled { 2 } else { 0 };
                let corners = [(x, y), (x + cell - gap, y + cell - gap)];
                if labelled || count > 0 {
                    let base = if labelled {
                        PALE.mix(0.45)
                    } else {
                        WHITE.mix(1.0)
                    };
                    area.draw(&Rectangle::new(corners, base.filled()))?;
                    // Rare confusions should be seen too.
                    let depth = if count > 0 { 0.12 + 0.88 * share } else { 0.0 };
                    area.draw(&Rectangle::new(corners, BLUE.mix(depth).filled()))?;
                }
                if labelled && count > 0 {
                    let color = if share > 0.5 { &WHITE } else { &BLACK };
                    let size = if cell >= 80 { LABEL } else { 24.0 };
                    let centered = style(size, color, HPos::Center, VPos::Center);
                    let middle = (x + cell / 2, y + cell / 2);
                    area.draw(&Text::new(count.to_string(), middle, centered))?;
                }
            }
        }
        if !labelled {
            let corners = [(left - 1, top - 1), (left + side, top + side)];
            area.draw(&Rectangle::new(corners, GREY.stroke_width(2)))?;
        }
        Ok(())
    })
}
