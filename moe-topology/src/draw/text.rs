//! A folding in the terminal.

use super::sizes;
use crate::{Attention, Axes, Cluster, Expert, Folding, Group, View};

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
    let left = folding.groups(Attention::ALL.minus(Attention::PP));
    let right = folding.groups(Expert::ALL.minus(Expert::PP));
    for stage in shown(left.zip(right).enumerate(), STAGES) {
        let Some((stage, (left, right))) = stage else {
            rows.push(["⋮".to_owned(), format!("{} more stages", stages - STAGES + 1), String::new()]);
            continue;
        };
        let (left, right) = (stage_rows(folding, left), stage_rows(folding, right));
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
        [
            format!("{view} {name}"),
            first.len().to_string(),
            folding.groups(axes).len().to_string(),
            cluster.widest(folding, axes).nodes.to_string(),
            ranks(first, LISTED, 1),
        ]
    })
}

/// One row per replica of the stage's layers: `dp 0   [0 1] [2 3]`.
fn stage_rows<V: View>(folding: &Folding, stage: Group<V>) -> Vec<String> {
    let [tensor, across, replicas, _] = [0, 1, 2, 3].map(Axes::<V>::axis);
    let digits = (folding.world_size() - 1).to_string().len();
    let in_bracket = if folding.size(tensor) <= 8 { 8 } else { 4 };
    let brackets = (WIDTH / (folding.size(tensor).min(in_bracket) * (digits + 1) + 2)).max(2);

    let label_width = format!("{replicas} 00 ").len();

    let bracket = |group: Option<Group<V>>| match group {
        Some(group) => format!("[{}]", ranks(group, in_bracket, digits)),
        None => "…".to_owned(),
    };
    let row = |row: Option<(usize, Group<V>)>| match row {
        Some((replica, ranks)) => {
            let label = format!("{replicas} {replica}");
            let brackets = shown(folding.groups_within(ranks, tensor), brackets).map(bracket);
            format!("{label:label_width$} {}", brackets.collect::<Vec<_>>().join(" "))
        }
        None => format!("⋮ {} more", folding.size(replicas) - ROWS + 1),
    };
    shown(folding.groups_within(stage, tensor | across).enumerate(), ROWS).map(row).collect()
}

/// `0 2 4 …`.
fn ranks<V: View>(group: Group<V>, limit: usize, digits: usize) -> String {
    let ranks = shown(group.iter(), limit).map(|rank| match rank {
        Some(rank) => format!("{rank:digits$}"),
        None => "…".to_owned(),
    });
    ranks.collect::<Vec<_>>().join(" ")
}

/// The items, if they are no more than `limit`; otherwise one fewer than `limit`, and `None` for all others.
fn shown<T>(items: impl ExactSizeIterator<Item = T>, limit: usize) -> impl Iterator<Item = Option<T>> {
    let fits = items.len() <= limit;
    items.take(if fits { limit } else { limit - 1 }).map(Some).chain((!fits).then_some(None))
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
