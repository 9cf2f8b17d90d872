//! A folding as a figure.

use super::sizes;
use crate::{Attention, Axes, Expert, Folding, View};

/// Lengths in pixels.
const MARGIN: usize = 28;
const CELL: [usize; 2] = [58, 40];
const GAP: usize = 10;
/// Room for the text over a panel.
const PANEL: usize = 240;
/// Around the ranks of a stage.
const PADDING: usize = 10;
const BETWEEN_STAGES: usize = 12;
const BETWEEN_VIEWS: usize = 40;
const STAGE_LABEL: usize = 64;
const HEADER: usize = 104;
const FOOTER: usize = 72;

/// The axes of either view by what they do.
const TENSOR: usize = 0;
const ACROSS: usize = 1;
const REPLICAS: usize = 2;
const PP: usize = 3;

/// Ranks in a row, and rows in all, at most.
const COLUMNS: usize = 8;
const ROWS: usize = 16;

/// One colour per replica, from the start again if there are more.
const PALETTE: [[usize; 3]; 8] = [
    [78, 121, 167],
    [242, 142, 43],
    [89, 161, 79],
    [176, 122, 161],
    [225, 87, 89],
    [86, 180, 173],
    [219, 182, 46],
    [156, 117, 95],
];

/// The ranks twice, attention groups beside MoE groups, as in Figure 1 of the folding paper.
///
/// A colour is one replica of a stage's layers (`dp`, `edp`): in attention the ranks that share a sequence, in the MoE
/// those that exchange tokens. Shades go along `cp` and `ep`, and a frame joins a `tp` or `etp` group. Of a large world
/// the first ranks and stages are drawn and the others counted. Equal foldings give equal bytes.
///
/// ```
/// use moe_topology::{Folding, Mapping, draw};
///
/// let mapping = Mapping { world_size: 16, tp: 2, cp: 2, pp: 2, ep: 4, ..Mapping::default() };
/// let svg = draw::svg(&Folding::new(mapping)?);
/// assert!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\"") && svg.ends_with("</svg>\n"));
/// # Ok::<(), moe_topology::Error>(())
/// ```
#[must_use]
pub fn svg(folding: &Folding) -> String {
    let grid = Grid::new(folding);
    let left = MARGIN + STAGE_LABEL;
    let right = left + grid.panel_width() + BETWEEN_VIEWS;
    let width = right + grid.panel_width() + MARGIN;
    let height = HEADER + grid.height() + FOOTER;
    let (world_size, order) = (folding.world_size(), folding.mapping().order);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"Helvetica, Arial, sans-serif\" fill=\"#1b1f24\">\n\
         <title>MoE parallel folding, world_size {world_size}</title>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    svg += &text(
        MARGIN,
        38,
        "font-size=\"19\" font-weight=\"bold\"",
        &format!("world_size {world_size}, order {order}"),
    );
    for (stage, y) in grid.stages() {
        let middle = y + grid.stage_height() / 2;
        svg += &text(MARGIN, middle + 4, "font-size=\"13\" fill=\"#57606a\"", &format!("stage {stage}"));
    }
    svg += &panel::<Attention>(folding, &grid, left, "Attention");
    svg += &panel::<Expert>(folding, &grid, right, "MoE");
    if let Some(rest) = grid.left_out(folding) {
        svg += &text(MARGIN, height - 18, "font-size=\"12\" fill=\"#57606a\"", &rest);
    }
    svg + "</svg>\n"
}

/// Where the ranks are drawn, the same in both panels.
struct Grid {
    columns: usize,
    /// Rows of a stage, and stages, that are drawn.
    rows: usize,
    stages: usize,
}

impl Grid {
    fn new(folding: &Folding) -> Self {
        let stages = folding.size(Attention::PP);
        let in_stage = folding.world_size() / stages;
        // Rows of equal length, unless that makes them narrow.
        let even = (1..=COLUMNS).rev().find(|&columns| in_stage.is_multiple_of(columns)).unwrap_or(1);
        let columns = if 2 * even > COLUMNS || even == in_stage { even } else { COLUMNS.min(in_stage) };
        // Of a pipeline at least two stages.
        let rows = in_stage.div_ceil(columns).min(ROWS / stages.min(2));
        Self { columns, rows, stages: stages.min(ROWS / rows) }
    }

    fn panel_width(&self) -> usize {
        (2 * PADDING + self.columns * (CELL[0] + GAP) - GAP).max(PANEL)
    }

    fn stage_height(&self) -> usize {
        2 * PADDING + self.rows * (CELL[1] + GAP) - GAP
    }

    fn height(&self) -> usize {
        self.stages * (self.stage_height() + BETWEEN_STAGES) - BETWEEN_STAGES
    }

    /// The drawn stages and their tops.
    fn stages(&self) -> impl Iterator<Item = (usize, usize)> {
        let step = self.stage_height() + BETWEEN_STAGES;
        (0..self.stages).map(move |stage| (stage, HEADER + stage * step))
    }

    /// Top left corner of the cell at `place`, from that of its stage.
    fn corner(&self, place: usize) -> (usize, usize) {
        let (row, column) = (place / self.columns, place % self.columns);
        (PADDING + column * (CELL[0] + GAP), PADDING + row * (CELL[1] + GAP))
    }

    fn left_out(&self, folding: &Folding) -> Option<String> {
        let stages = folding.size(Attention::PP);
        let in_stage = folding.world_size() / stages;
        let drawn = in_stage.min(self.rows * self.columns);
        (drawn * self.stages < folding.world_size()).then(|| {
            format!("drawn: {drawn} of {in_stage} ranks of each stage, {} of {stages} stages", self.stages)
        })
    }
}

/// One view: title, ranks by stage, legend.
fn panel<V: View>(folding: &Folding, grid: &Grid, x: usize, title: &str) -> String {
    let mut svg = text(x, HEADER - 34, "font-size=\"16\" font-weight=\"bold\"", title);
    svg += &text(x, HEADER - 14, "font-size=\"13\" fill=\"#57606a\"", &sizes::<V>(folding));
    for ((_, y), stage) in grid.stages().zip(folding.groups(Axes::<V>::ALL.minus(Axes::axis(PP)))) {
        svg += &rect([x, y, grid.panel_width(), grid.stage_height()], 10, "fill=\"#f3f4f6\"");
        let drawn: Vec<usize> = stage.iter().take(grid.rows * grid.columns).collect();
        for (place, &rank) in drawn.iter().enumerate() {
            let (dx, dy) = grid.corner(place);
            svg += &cell::<V>(folding, rank, x + dx, y + dy);
        }
        svg += &frames::<V>(folding, grid, &drawn, x, y);
    }
    svg + &legend::<V>(folding, x, HEADER + grid.height() + 22)
}

/// A rank: its number, and its place in the group that shares a colour.
fn cell<V: View>(folding: &Folding, rank: usize, x: usize, y: usize) -> String {
    let [tensor, across, replica] = [TENSOR, ACROSS, REPLICAS].map(Axes::<V>::axis);
    let coordinate = |axis| folding.coordinate(rank, axis);
    let fill = color(coordinate(replica), coordinate(across), folding.size(across));
    let mut svg = rect([x, y, CELL[0], CELL[1]], 6, &format!("fill=\"{fill}\""));

    let axes = [tensor, across].into_iter().filter(|axis| folding.size(*axis) > 1);
    let label = axes.map(|axis| format!("{axis}{}", coordinate(axis))).collect::<Vec<_>>().join(" ");
    let (center, centered) = (x + CELL[0] / 2, "text-anchor=\"middle\"");
    let bold = format!("font-size=\"14\" font-weight=\"bold\" {centered}");
    svg += &text(center, y + 18, &bold, &rank.to_string());
    svg + &text(center, y + 32, &format!("font-size=\"10\" {centered}"), &label)
}

/// A frame around the neighbours in a row that belong to one tensor-parallel group.
fn frames<V: View>(folding: &Folding, grid: &Grid, drawn: &[usize], x: usize, y: usize) -> String {
    let tensor = Axes::<V>::axis(TENSOR);
    let mut svg = String::new();
    if folding.size(tensor) == 1 {
        return svg;
    }
    let mut place = 0;
    for row in drawn.chunks(grid.columns) {
        for run in row.chunk_by(|a, b| folding.group(*a, tensor) == folding.group(*b, tensor)) {
            let (dx, dy) = grid.corner(place);
            let width = run.len() * (CELL[0] + GAP) - GAP;
            let frame = [x + dx - 3, y + dy - 3, width + 6, CELL[1] + 6];
            svg += &rect(frame, 8, "fill=\"none\" stroke=\"#1b1f24\" stroke-width=\"1.5\"");
            place += run.len();
        }
    }
    svg
}

fn legend<V: View>(folding: &Folding, x: usize, y: usize) -> String {
    let [tensor, across, replicas] = [TENSOR, ACROSS, REPLICAS].map(Axes::<V>::axis);
    let mut svg = String::new();
    let swatches = folding.size(replicas).min(PALETTE.len());
    for replica in 0..swatches {
        svg += &rect([x + replica * 18, y - 10, 14, 14], 3, &format!("fill=\"{}\"", color(replica, 0, 1)));
    }
    let mut words = vec![format!("colour: {replicas}")];
    if folding.size(across) > 1 {
        words.push(format!("shade: {across}"));
    }
    if folding.size(tensor) > 1 {
        words.push(format!("frame: {tensor} group"));
    }
    let x = x + swatches * 18 + 6;
    svg + &text(x, y + 2, "font-size=\"12\" fill=\"#57606a\"", &words.join(" · "))
}

/// The replica's colour, lighter along the axis across.
fn color(replica: usize, across: usize, size: usize) -> String {
    let white = 25 + 50 * across / size.saturating_sub(1).max(1);
    let [red, green, blue] = PALETTE[replica % PALETTE.len()].map(|part| part + (255 - part) * white / 100);
    format!("#{red:02x}{green:02x}{blue:02x}")
}

fn rect([x, y, width, height]: [usize; 4], radius: usize, style: &str) -> String {
    format!("<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"{radius}\" {style}/>\n")
}

fn text(x: usize, y: usize, style: &str, text: &str) -> String {
    if text.is_empty() {
        return String::new();
    }
    format!("<text x=\"{x}\" y=\"{y}\" {style}>{text}</text>\n")
}
