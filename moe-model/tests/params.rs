//! Laws of parameter layouts: whatever the folding, every logical element has one owner and one starting value.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::Range;

use moe_model::params::{
    BucketLayout, Init, Logical, Name, OtherCopy, ParamLayout, ParamLayoutBuilder, Placed, Stream,
};
use moe_model::{DecoderStage, Execution, ModelConfig, PipelineLayout};
use moe_pipeline::Placement as StagePlacement;
use moe_topology::{Attention, Folding, Mapping, Owner, Placement};
use proptest::prelude::*;

fn model() -> ModelConfig {
    let mut model: ModelConfig = serde_json::from_str(
        r#"{"vocab_size": 37, "hidden_size": 10, "intermediate_size": 12, "num_hidden_layers": 6,
            "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 4,
            "num_local_experts": 8, "num_experts_per_tok": 2}"#,
    )
    .unwrap();
    model.tie_word_embeddings = true;
    model.mlp_only_layers = vec![1];
    (model.use_qk_norm, model.attention_bias) = (true, true);
    model.shared_expert_intermediate_size = Some(6);
    model
}

/// Even with one stage per rank, or uneven with two, in rounds or in a V, as the size of a stage is even, odd, or a multiple
/// of 3.
fn pipeline(folding: &Folding) -> PipelineLayout {
    let pp = folding.size(Attention::PP);
    let ranks = folding.world_size() / pp;
    let uneven = || PipelineLayout::new(6, pp, &[&[0][..], &vec![1; 2 * pp - 2], &[8 - 2 * pp]].concat());
    match (ranks % 3, ranks % 2) {
        (0, _) => uneven().unwrap().placed(StagePlacement::v_shaped(pp as u32).unwrap()).unwrap(),
        (_, 0) => PipelineLayout::even(6, pp, 1).unwrap(),
        _ => uneven().unwrap(),
    }
}

fn layout(folding: &Folding, rank: usize) -> ParamLayout {
    let mut params = ParamLayoutBuilder::new(folding, rank);
    let stages =
        DecoderStage::of_rank(&mut params, &model(), Execution::default(), &pipeline(folding)).unwrap();
    assert_eq!(stages.len(), pipeline(folding).virtual_stages());
    params.build()
}

fn foldings() -> impl Strategy<Value = Folding> {
    let axes = (
        prop::sample::select(vec![1usize, 2, 4, 6]),
        1usize..=3,
        1usize..=3,
        prop::sample::select(vec![1usize, 2, 3, 6]),
        prop::sample::select(vec![1usize, 2, 4, 8]),
        any::<bool>(),
        prop::sample::select(vec![1usize, 1, 2, 3]),
    );
    axes.prop_filter_map("legal", |(tp, dp, pp, etp, ep, dp_last, instances)| {
        let order = if dp_last { "tp-cp-ep-pp-dp" } else { "tp-cp-ep-dp-pp" }.parse().ok()?;
        let mapping = Mapping { world_size: tp * dp * pp, tp, pp, etp, ep, order, ..Mapping::default() };
        Folding::new(mapping.split(Attention::TP_OUTER, tp.min(2)).optimizer_instances(instances)).ok()
    })
}

fn initial(bucket: &BucketLayout, seed: u64, range: Range<usize>) -> Vec<f64> {
    let mut values = vec![0.0; range.len()];
    let done: Result<(), Infallible> = bucket.initial(
        seed,
        range.clone(),
        |x| x,
        |at, run| {
            values[at - range.start..][..run.len()].copy_from_slice(run);
            Ok(())
        },
    );
    done.unwrap();
    values
}

/// A bucket that takes more than one run of elements, so that several cores make it, is made of the elements.
#[test]
fn large_tensors_start_as_small_ones_do() {
    let folding = Folding::new(Mapping { world_size: 3, tp: 3, ..Mapping::default() }).unwrap();
    let mut params = ParamLayoutBuilder::new(&folding, 1);
    let placement =
        Placement::new(&[301, 1539], &[(1, Attention::TP)], Attention::DP, Owner::Stage(0)).unwrap();
    let (name, placement, init) = (Name::One("w".into()), Placed::Attention(placement), Init::Normal(2.0));
    params.add(&[Logical { name, placement, init }]).unwrap();
    let layout = params.build();
    let [bucket] = layout.buckets() else { panic!("one bucket") };
    let stream = Stream::new(5, "w", Init::Normal(2.0));
    let range = 1000..bucket.len - 777;
    let values = initial(bucket, 5, range.clone());
    for (at, value) in range.zip(values) {
        let want =
            if at < 301 * 513 { stream.element((at / 513 * 1539 + 513 + at % 513) as u64) } else { 0.0 };
        assert_eq!(value.to_bits(), want.to_bits(), "element {at}");
    }
}

/// Keys of a ring come in two runs of positions each, which a window does not fit.
#[test]
fn a_window_on_a_ring_is_refused() {
    let model = ModelConfig { sliding_window: Some(64), ..model() };
    let folding =
        Folding::new(Mapping { world_size: 2, cp: 2, ..Mapping::default() }.split(Attention::CP_OUTER, 2))
            .unwrap();
    let mut params = ParamLayoutBuilder::new(&folding, 0);
    let refused = DecoderStage::of_rank(&mut params, &model, Execution::default(), &pipeline(&folding));
    let said = refused.unwrap_err().to_string();
    assert!(
        said.starts_with("sliding_window = 64 is not supported on a context-parallel ring of 2 ranks"),
        "{said}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_element_is_owned_once(folding in foldings()) {
        let one = layout(&Folding::new(Mapping::default()).unwrap(), 0);
        let mut owners: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        for part in one.buckets().iter().flat_map(|b| &b.parts) {
            owners.insert(&part.name, vec![0; part.len()]);
        }
        for rank in 0..folding.world_size() {
            for bucket in layout(&folding, rank).buckets() {
                prop_assert!(bucket.slice.end <= bucket.len);
                for part in bucket.parts.iter().filter(|part| part.counts) {
                    let owner = owners.get_mut(part.name.as_str()).expect("a name that one rank knows");
                    for at in part.range().filter(|at| bucket.slice.contains(at)) {
                        owner[part.logical_index(at - part.offset)] += 1;
                    }
                }
            }
        }
        for (name, owner) in owners {
            prop_assert!(owner.iter().all(|&n| n == 1), "{name}: {owner:?}");
        }
    }

    #[test]
    fn weights_start_alike_under_any_folding(folding in foldings(), seed in any::<u64>()) {
        let one = layout(&Folding::new(Mapping::default()).unwrap(), 0);
        let mut start: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for bucket in one.buckets() {
            let values = initial(bucket, seed, 0..bucket.len);
            for part in &bucket.parts {
                start.insert(&part.name, values[part.range()].to_vec());
            }
        }
        let rank = seed as usize % folding.world_size();
        for bucket in layout(&folding, rank).buckets() {
            let values = initial(bucket, seed, 0..bucket.len);
            prop_assert_eq!(&values[bucket.slice.clone()], &initial(bucket, seed, bucket.slice.clone())[..]);
            for part in &bucket.parts {
                for (n, value) in values[part.range()].iter().enumerate() {
                    prop_assert_eq!(*value, start[part.name.as_str()][part.logical_index(n)]);
                }
            }
        }
    }

    /// So a reduction can start as soon as one layer has its gradients, and the cut of optimizer state does not depend on
    /// what else is on a stage.
    #[test]
    fn a_bucket_is_of_one_layer(folding in foldings(), pick in any::<usize>()) {
        let layer = |name: &str| match name.strip_prefix("model.layers.") {
            Some(rest) => rest.split('.').next().map(str::to_owned),
            None => Some(if name == "model.norm.weight" { "head" } else { "embedding" }.to_owned()),
        };
        let layout = layout(&folding, pick % folding.world_size());
        let [first_rank, last_rank] = pipeline(&folding).ends();
        let stages = pipeline(&folding).stages();
        let mut last = BTreeMap::new();
        for (index, bucket) in layout.buckets().iter().enumerate() {
            let tied = bucket.parts[0].name == "model.embed_tokens.weight" && stages > 1;
            match bucket.other_copy {
                None => prop_assert!(!tied),
                Some(OtherCopy::OtherEnd) => prop_assert!(tied && first_rank != last_rank),
                Some(OtherCopy::Bucket(other)) => {
                    prop_assert!(tied && first_rank == last_rank);
                    let copy = &layout.buckets()[other];
                    prop_assert_eq!(copy.other_copy, Some(OtherCopy::Bucket(index)));
                    prop_assert_eq!((&copy.slice, copy.len), (&bucket.slice, bucket.len));
                    if other < index {
                        // The second copy, that of the head, counts nowhere.
                        prop_assert!(bucket.parts.iter().all(|part| !part.counts));
                        continue;
                    }
                }
            }
            let first = layer(&bucket.parts[0].name);
            prop_assert!(bucket.parts.iter().all(|part| layer(&part.name) == first));
            // Neighbours, in the order of the layers.
            let before = last.insert(first.clone(), index);
            prop_assert!(before.is_none_or(|before| before + 1 == index), "{first:?}");
            // Embedding and head share their matrix where one stage has both.
            let shared = bucket.parts[0].name == "model.embed_tokens.weight" && stages == 1;
            prop_assert_eq!(bucket.users, if shared { 2 } else { 1 });
        }
    }

    /// Ranks that reduce a bucket together must have laid it out alike.
    #[test]
    fn a_reduction_group_has_one_layout(folding in foldings(), pick in any::<usize>()) {
        let rank = pick % folding.world_size();
        for (index, bucket) in layout(&folding, rank).buckets().iter().enumerate() {
            for (position, peer) in folding.ranks(rank, bucket.group).iter().enumerate() {
                let other = layout(&folding, peer);
                let other = &other.buckets()[index];
                prop_assert_eq!(other.group, bucket.group);
                prop_assert_eq!(&other.parts, &bucket.parts);
                prop_assert_eq!(other.len, bucket.len);
                prop_assert_eq!(other.slice.start, position * bucket.slice.len());
            }
            // Each instance of the optimizer has all of it, and what several have counts once.
            let keepers = bucket.instances.map(|key| folding.ranks(rank, key));
            for (instance, peer) in keepers.iter().flat_map(|ranks| ranks.iter()).enumerate() {
                let other = layout(&folding, peer);
                let other = &other.buckets()[index];
                prop_assert_eq!(&other.slice, &bucket.slice);
                prop_assert!(instance == 0 || other.parts.iter().all(|part| !part.counts));
            }
        }
    }
}
