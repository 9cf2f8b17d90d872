//! A timeline as a drawing.

use std::fmt::Write;

use super::kept;
use crate::{Kind, Span, Timeline};

/// Widths and heights, in pixels.
const CHART: f64 = 1200.0;
const LEFT: f64 = 80.0;
const ROW: f64 = 26.0;
/// Under a rank's blocks, the activations that it keeps.
const STRIP: f64 = 14.0;
const GAP: f64 = 4.0;
const LEGEND: f64 = 30.0;
/// Narrower blocks get no number.
const LABELLED: f64 = 12.0;

const BACKGROUND: &str = "#f4f4f4";
const KEPT: &str = "#b9a7d3";
const LEGENDS: [(&str, Kind); 4] =
    [("F", Kind::Forward), ("B", Kind::Backward), ("I", Kind::BackwardInput), ("W", Kind::BackwardWeight)];

impl Timeline {
    /// An SVG drawing: one row per rank, time from left to right. Blocks are coloured by what is done, darker for a rank's later
    /// stages, and carry their micro-batch; an overlap is its `F` above its `B`. Each block's tooltip names it and its times. Under its
    /// blocks is how many activations of a stage the rank keeps, on one scale for all ranks, and the most of them.
    pub fn svg(&self) -> String {
        let scale = if self.makespan > 0.0 { CHART / self.makespan } else { 0.0 };
        let kept: Vec<_> = self.spans.iter().map(|spans| kept(spans)).collect();
        let most = kept.iter().flatten().map(|&(_, kept)| kept).max();
        let row = ROW + GAP + if most.is_some() { STRIP } else { 0.0 };
        let (width, height) = (LEFT + CHART, LEGEND + self.spans.len() as f64 * row);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
             font-size=\"11\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
        );
        let colours = LEGENDS.map(|(name, kind)| (name, colour(kind, 0)));
        let strips = most.map(|_| ("activations kept", KEPT.to_owned()));
        for (at, (name, fill)) in colours.into_iter().chain(strips).enumerate() {
            let x = LEFT + 60.0 * at as f64;
            svg += &format!(
                "<rect x=\"{x}\" y=\"8\" width=\"14\" height=\"14\" fill=\"{fill}\"/><text x=\"{}\" y=\"19\">{name}</text>\n",
                x + 19.0
            );
        }
        for (rank, spans) in self.spans.iter().enumerate() {
            let y = LEGEND + rank as f64 * row;
            svg += &format!(
                "<text x=\"4\" y=\"{}\">rank {rank}</text><rect x=\"{LEFT}\" y=\"{y}\" width=\"{CHART}\" height=\"{ROW}\" \
                 fill=\"{BACKGROUND}\"/>\n",
                y + ROW * 0.65
            );
            let mut stages: Vec<u32> =
                spans.iter().flat_map(|s| s.action.parts()).map(|part| part.stage).collect();
            stages.sort_unstable();
            stages.dedup();
            spans.iter().for_each(|span| block(&mut svg, span, &stages, y, scale));
            if let Some(most) = most {
                strip(&mut svg, &kept[rank], most, y + ROW, scale);
            }
        }
        svg += "</svg>\n";
        svg
    }
}

/// A span in its rank's row, whose stages are given.
fn block(svg: &mut String, span: &Span, stages: &[u32], y: f64, scale: f64) {
    let Span { action, start, end } = *span;
    let (x, width) = (LEFT + start * scale, (end - start) * scale);
    let height = ROW / action.parts().count() as f64;
    let _ = write!(svg, "<g><title>{action}, {start} to {end}</title>");
    for (at, part) in action.parts().enumerate() {
        let y = y + at as f64 * height;
        let fill = colour(part.kind, stages.partition_point(|&stage| stage < part.stage));
        let _ = write!(
            svg,
            "<rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{height:.1}\" fill=\"{fill}\" stroke=\"white\" \
             stroke-width=\"0.5\"/>"
        );
        if width >= LABELLED {
            let (x, y) = (x + width / 2.0, y + height / 2.0 + 4.0);
            let _ = write!(
                svg,
                "<text x=\"{x:.2}\" y=\"{y:.1}\" text-anchor=\"middle\">{}</text>",
                part.microbatch
            );
        }
    }
    *svg += "</g>\n";
}

/// The activations that a rank keeps, below its row; `most` fill the strip.
fn strip(svg: &mut String, kept: &[(f64, u32)], most: u32, y: f64, scale: f64) {
    let bottom = y + STRIP;
    let mut path = format!("M{LEFT} {bottom:.1}");
    for &(at, kept) in kept {
        let top = bottom - (STRIP - 1.0) * f64::from(kept) / f64::from(most.max(1));
        let _ = write!(path, "H{:.2}V{top:.2}", LEFT + at * scale);
    }
    let peak = kept.iter().map(|&(_, kept)| kept).max().unwrap_or(0);
    let _ = writeln!(
        svg,
        "<path d=\"{path}V{bottom:.1}Z\" fill=\"{KEPT}\"/><text x=\"4\" y=\"{:.1}\" fill=\"#6b5a8e\">keeps {peak}</text>",
        bottom - 3.0
    );
}

/// The colour of a pass of a rank's `nth` stage, in red, green and blue: not every program that reads SVG knows `hsl()`.
fn colour(kind: Kind, nth: usize) -> String {
    let (hue, saturation) = match kind {
        Kind::Forward => (210.0, 0.7),
        Kind::BackwardInput => (150.0, 0.45),
        Kind::BackwardWeight => (35.0, 0.8),
        _ => (120.0, 0.45),
    };
    let lightness = 0.78 - 0.12 * nth.min(3) as f64;
    let chroma = saturation * lightness.min(1.0 - lightness);
    let channel = |turn: f64| {
        let at = (turn + hue / 30.0) % 12.0;
        let part = lightness - chroma * (at - 3.0).min(9.0 - at).clamp(-1.0, 1.0);
        (255.0 * part).round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", channel(0.0), channel(8.0), channel(4.0))
}
