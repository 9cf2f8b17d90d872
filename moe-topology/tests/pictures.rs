//! Pictures of small and of very large worlds, and locality.

use moe_topology::{Attention, Cluster, Error, Expert, Folding, Mapping, Order, Span, draw};

fn worlds() -> Vec<Folding> {
    let one = Mapping::default();
    let million =
        Mapping { world_size: 1 << 20, tp: 8, cp: 16, pp: 64, ep: 256, etp: 2, ..Mapping::default() };
    let odd = Mapping { world_size: 36, tp: 3, cp: 2, pp: 3, ep: 4, ..Mapping::default() };
    let dp_last =
        Mapping { world_size: 16, tp: 4, pp: 2, ep: 2, etp: 2, order: Order::DP_LAST, ..one.clone() };
    let wide = Mapping { world_size: 4096, tp: 64, ep: 8, etp: 16, ..Mapping::default() };
    let prime = Mapping { world_size: 22, pp: 2, ep: 11, ..Mapping::default() };
    [one, million, odd, dp_last, wide, prime].map(|mapping| Folding::new(mapping).unwrap()).into()
}

#[test]
fn text_fits_a_screen() {
    for folding in worlds() {
        let text = draw::text(&folding);
        assert!(text.lines().count() <= 40, "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 180), "{text}");
        assert_eq!(text, draw::text(&folding));
    }
}

#[test]
fn text_shows_stages_where_ranks_are_not_consecutive() {
    let folding = &worlds()[3];
    assert_eq!(
        draw::text(folding),
        "\
world_size 16, order tp-cp-ep-pp-dp
          attention: tp 4 · cp 1 · dp 2 · pp 2   moe: etp 2 · ep 2 · edp 2 · pp 2
stage 0   dp 0   [ 0  1  2  3]                   edp 0   [ 0  1] [ 2  3]
          dp 1   [ 8  9 10 11]                   edp 1   [ 8  9] [10 11]
stage 1   dp 0   [ 4  5  6  7]                   edp 0   [ 4  5] [ 6  7]
          dp 1   [12 13 14 15]                   edp 1   [12 13] [14 15]
"
    );
}

#[test]
fn what_is_left_out_is_counted() {
    let text = draw::text(&worlds()[1]);
    assert!(text.contains("61 more stages"), "{text}");
    assert!(text.contains("⋮ 121 more") && text.contains("⋮ 25 more"), "{text}");
    let svg = draw::svg(&worlds()[1]);
    assert!(svg.contains("drawn: 64 of 16384 ranks of each stage, 2 of 64 stages"), "{svg}");
}

#[test]
fn svg_is_small_well_formed_and_the_same_each_time() {
    for folding in worlds() {
        let svg = draw::svg(&folding);
        assert!(svg.len() < 128 * 1024);
        assert_eq!(svg, draw::svg(&folding));
        // Every element is closed: `<name …/>`, or `<name …>…</name>`.
        let (mut open, mut rest) = (Vec::new(), svg.as_str());
        while let Some((_, tag)) = rest.split_once('<') {
            let (tag, after) = tag.split_once('>').unwrap();
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name)),
                None if tag.ends_with('/') => {}
                None => open.push(tag.split(' ').next().unwrap()),
            }
            rest = after;
        }
        assert!(open.is_empty());
        let drawn = svg.matches("font-size=\"14\"").count();
        assert_eq!(drawn, 2 * folding.world_size().min(128), "every rank twice");
    }
    // The figure of the README is the one that `examples/folding.rs` draws.
    let mapping = Mapping { world_size: 32, tp: 2, cp: 2, pp: 2, ep: 8, ..Mapping::default() };
    assert_eq!(draw::svg(&Folding::new(mapping).unwrap()), include_str!("../docs/folding.svg"));
    let svg = draw::svg(&worlds()[2]);
    assert_eq!(svg.matches("font-size=\"14\"").count(), 2 * 36);
}

#[test]
fn locality_counts_nodes_by_definition() {
    let cluster = Cluster::new(6, 18).unwrap();
    for folding in worlds().into_iter().filter(|folding| folding.world_size() < 5000) {
        for axes in [Expert::EP, Expert::ETP | Expert::EDP, Expert::ALL] {
            let mut widest = Span { nodes: 0, nvlink_domains: 0 };
            for group in folding.groups(axes) {
                let ranks = group.ranks();
                let mut nodes: Vec<usize> = ranks.iter().map(|rank| rank / 6).collect();
                nodes.dedup();
                let mut domains: Vec<usize> = ranks.iter().map(|rank| rank / 18).collect();
                domains.dedup();
                assert_eq!(cluster.nodes(ranks), nodes.len());
                assert_eq!(cluster.span(ranks), Span { nodes: nodes.len(), nvlink_domains: domains.len() });
                assert_eq!(cluster.inside_node(ranks), nodes.len() == 1);
                assert_eq!(cluster.inside_nvlink_domain(ranks), domains.len() == 1);
                widest.nodes = widest.nodes.max(nodes.len());
                widest.nvlink_domains = widest.nvlink_domains.max(domains.len());
            }
            assert_eq!(cluster.widest(&folding, axes), widest);
        }
    }
}

/// The point of folding: long context on 128 ranks keeps CP and EP inside one node each.
#[test]
fn folding_keeps_the_all_to_all_inside_a_node() {
    let mapping = Mapping { world_size: 128, tp: 2, cp: 4, pp: 8, ep: 8, ..Mapping::default() };
    let folding = Folding::new(mapping).unwrap();
    let cluster = Cluster::default();
    assert_eq!(cluster.widest(&folding, Expert::ETP | Expert::EP).nodes, 1);
    assert_eq!(cluster.widest(&folding, Attention::TP | Attention::CP).nodes, 1);
    assert_eq!(cluster.widest(&folding, Attention::PP).nodes, 8);
    assert_eq!(Cluster::new(0, 8), Err(Error::EmptyNode { ranks_per_node: 0, nvlink_domain: 8 }));
}
