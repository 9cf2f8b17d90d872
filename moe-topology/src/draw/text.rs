//! A folding in the terminal.

use crate::{Attention, Axes, Cluster, Expert, Folding, View};

/// How many stages, rows of a stage, and ranks of a listed group are shown before the rest is left out.
const STAGES: usize = 4;
const ROWS: usize = 8;
const LISTED: usize = 8;
/// Characters for the ranks of a row.
const WIDTH: usize = 64;

/// The ranks of each stage twice: a row per `dp` with `cp` to the right and each `tp` group in brackets, beside a row
/// per `edp` with `ep` to the right and each `etp` group in brackets. What does not fit is left out and counted.
///
/// ```
/// use moe_topology::{Folding, Mapping, draw};
///
/// let mapping = Mapping { world_size: 16, tp: 2, cp: 2, pp: 2, ep: 4, ..Mapping::default() };
/// let picture = draw::text(&Folding::new(mapping)?);
/// assert_eq!(picture, "\
/// world_size 16, order tp-cp-ep-dp-pp
///           attention: tp 2 · cp 2 · dp 2 · pp 2   moe: etp 1 · ep 4 · edp 2 · pp 2
/// stage 0   dp 0   [ 0  1] [ 2  3]                 edp 0   [ 0] [ 1] [ 2] [ 3]
///           dp 1   [ 4  5] [ 6  7]                 edp 1   [ 4] [ 5] [ 6] [ 7]
/// stage 1   dp 0   [ 8  9] [10 11]                 edp 0   [ 8] [ 9] [10] [11]
///           dp 1   [12 13] [14 15]                 edp 1   [12] [13] [14] [15]
/// ");
/// # Ok::<(), moe_topology::Error>(())
/// ```
#[must_use]
pub fn text(folding: &Folding) -> String {
    let mut rows = vec![[
        String::new(),
        format!("attention: {}", sizes::<Attention>(folding)),
        format!("moe: {}", sizes::<Expert>(folding)),
    ]];
    let stages = folding.size(Attention::PP);
    for stage in shown(stages, STAGES) {
        let Some(stage) = stage else {
            rows.push(["⋮".to_owned(), format!("{} more stages", stages - STAGES + 1), String::new()]);
            continue;
        };
        let (left, right) = (stage_rows::<Attention>(folding, stage), stage_rows::<Expert>(folding, stage));
        for row in 0..left.len().max(right.len()) {
            let label = if row == 0 { format!("stage {stage}") } else { String::new() };
            let cell = |rows: &[String]| rows.get(row).cloned().unwrap_or_default();
            rows.push([label, cell(&left), cell(&right)]);
        }
    }
    format!("world_size {}, order {}\n{}", folding.world_size(), folding.mapping().order, columns(&rows))
}

/// The groups of [`View::GROUPS`]: size, number, the first one, and the most nodes that one spans on `cluster`.
///
/// ```
/// use moe_topology::{Cluster, Folding, Mapping, draw};
///
/// let mapping = Mapping { world_size: 32, tp: 2, pp: 2, ep: 8, ..Mapping::default() };
/// let table = draw::table(&Folding::new(mapping)?, &Cluster::default());
/// assert!(table.starts_with("\
/// group             size   groups   nodes   first group
/// attention tp      2      16       1       0 1
/// attention cp      1      32       1       0
/// attention dp      8      4        2       0 2 4 6 8 10 12 14
/// "));
/// # Ok::<(), moe_topology::Error>(())
/// ```
#[must_use]
pub fn table(folding: &Folding, cluster: &Cluster) -> String {
    let mut rows = vec![["group", "size", "groups", "nodes", "first group"].map(str::to_owned)];
    rows.extend(table_rows::<Attention>("attention", folding, cluster));
    rows.extend(table_rows::<Expert>("moe", folding, cluster));
    columns(&rows)
}

fn table_rows<V: View>(
    view: &str,
    folding: &Folding,
    cluster: &Cluster,
) -> impl Iterator<Item = [String; 5]> {
    V::GROUPS.iter().map(move |&(name, axes)| {
        let first = folding.group(0, axes);
        let ranks = shown(first.len(), LISTED).map(|place| match place {
            Some(place) => first.get(place).to_string(),
            None => "…".to_owned(),
        });
        [
            format!("{view} {name}"),
            first.len().to_string(),
            folding.groups(axes).len().to_string(),
            cluster.widest(folding, axes).nodes.to_string(),
            ranks.collect::<Vec<_>>().join(" "),
        ]
    })
}

/// `tp 2 · cp 2 · dp 2 · pp 2`.
fn sizes<V: View>(folding: &Folding) -> String {
    let axes = Axes::<V>::ALL.iter().map(|axis| format!("{axis} {}", folding.size(axis)));
    axes.collect::<Vec<_>>().join(" · ")
}

/// One row per replica of the stage's layers: `dp 0   [0 1] [2 3]`.
fn stage_rows<V: View>(folding: &Folding, stage: usize) -> Vec<String> {
    let [tensor, across, replicas, _] = [0, 1, 2, 3].map(|axis| folding.size(Axes::<V>::axis(axis)));
    let digits = (folding.world_size() - 1).to_string().len();
    let in_bracket = if tensor <= 8 { tensor } else { 4 };
    let brackets = (WIDTH / (in_bracket * (digits + 1) + 2)).max(2);

    let row = |replica: Option<usize>| {
        let Some(replica) = replica else { return format!("⋮ {} more", replicas + 1 - ROWS) };
        let mut row =
            format!("{:width$} ", format!("{} {replica}", V::AXES[2]), width = V::AXES[2].len() + 3);
        for place in shown(across, brackets) {
            let Some(place) = place else {
                row.push_str(" …");
                continue;
            };
            let rank = |tensor| folding.rank_at::<V>([tensor, place, replica, stage]).unwrap_or_default();
            let ranks = shown(tensor, in_bracket).map(|tensor| match tensor {
                Some(tensor) => format!("{:digits$}", rank(tensor)),
                None => "…".to_owned(),
            });
            row.push_str(&format!(" [{}]", ranks.collect::<Vec<_>>().join(" ")));
        }
        row
    };
    shown(replicas, ROWS).map(row).collect()
}

/// The indices below `n`; `None` stands for what goes beyond `limit` places.
fn shown(n: usize, limit: usize) -> impl Iterator<Item = Option<usize>> {
    let fits = n <= limit;
    (0..if fits { n } else { limit - 1 }).map(Some).chain((!fits).then_some(None))
}

/// Left-aligned columns.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |text: &String| text.chars().count();
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| width(&row[column])).max().unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("   ").trim_end());
        text.push('\n');
    }
    text
}
