//! Files of the hub: names by family, blocks, types, and every way in which files are refused.

use std::fs;
use std::path::{Path, PathBuf};

use moe_kernels::bf16;
use moe_model::ModelConfig;
use moe_model::hf::{Family, FloatType, HubFolder, HubName, HubNames, TensorFile, WeightsError, WritePlan};
use proptest::prelude::*;
use serde_json::{Value, json};

const FAMILIES: [Family; 5] =
    [Family::Mixtral, Family::Qwen2Moe, Family::Qwen3Moe, Family::Olmoe, Family::DeepseekV3];

/// A model of two layers with what `family` may have; the first is dense but for Mixtral and OLMoE.
fn model(family: Family) -> ModelConfig {
    let mut config = json!({
        "vocab_size": 7, "hidden_size": 6, "intermediate_size": 5, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 3, "head_dim": 2, "num_local_experts": 2, "num_experts_per_tok": 1,
    });
    let more = match family {
        Family::Mixtral => json!({}),
        Family::Qwen2Moe => json!({
            "moe_intermediate_size": 3, "shared_expert_intermediate_size": 4, "attention_bias": true,
            "mlp_only_layers": [0],
        }),
        Family::Qwen3Moe => json!({
            "moe_intermediate_size": 3, "use_qk_norm": true, "tie_word_embeddings": true, "mlp_only_layers": [0],
        }),
        Family::Olmoe => json!({ "use_qk_norm": true }),
        Family::DeepseekV3 => json!({
            "head_dim": null, "kv_lora_rank": 4, "q_lora_rank": 5, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2,
            "v_head_dim": 3, "moe_intermediate_size": 3, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "scoring_func": "sigmoid", "moe_router_enable_expert_bias": true,
        }),
    };
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    serde_json::from_value(config).unwrap()
}

fn names(family: Family) -> HubNames {
    HubNames::new(family, &model(family)).unwrap()
}

/// The files' names and shapes of layer 1, written down from transformers' modules.
fn layer_1(family: Family) -> Vec<(&'static str, Vec<usize>)> {
    let attention = [
        ("self_attn.q_proj.weight", vec![6, 6]),
        ("self_attn.k_proj.weight", vec![6, 6]),
        ("self_attn.v_proj.weight", vec![6, 6]),
        ("self_attn.o_proj.weight", vec![6, 6]),
    ];
    let experts = |width: usize| {
        vec![
            ("mlp.gate.weight", vec![2, 6]),
            ("mlp.experts.0.gate_proj.weight", vec![width, 6]),
            ("mlp.experts.0.up_proj.weight", vec![width, 6]),
            ("mlp.experts.0.down_proj.weight", vec![6, width]),
            ("mlp.experts.1.gate_proj.weight", vec![width, 6]),
            ("mlp.experts.1.up_proj.weight", vec![width, 6]),
            ("mlp.experts.1.down_proj.weight", vec![6, width]),
        ]
    };
    let mut all = vec![("input_layernorm.weight", vec![6]), ("post_attention_layernorm.weight", vec![6])];
    match family {
        Family::Mixtral => {
            all.extend(attention);
            all.extend([
                ("block_sparse_moe.gate.weight", vec![2, 6]),
                ("block_sparse_moe.experts.0.w1.weight", vec![5, 6]),
                ("block_sparse_moe.experts.0.w2.weight", vec![6, 5]),
                ("block_sparse_moe.experts.0.w3.weight", vec![5, 6]),
                ("block_sparse_moe.experts.1.w1.weight", vec![5, 6]),
                ("block_sparse_moe.experts.1.w2.weight", vec![6, 5]),
                ("block_sparse_moe.experts.1.w3.weight", vec![5, 6]),
            ]);
        }
        Family::Qwen2Moe => {
            all.extend(attention);
            all.extend([
                ("self_attn.q_proj.bias", vec![6]),
                ("self_attn.k_proj.bias", vec![6]),
                ("self_attn.v_proj.bias", vec![6]),
                ("mlp.shared_expert.gate_proj.weight", vec![4, 6]),
                ("mlp.shared_expert.up_proj.weight", vec![4, 6]),
                ("mlp.shared_expert.down_proj.weight", vec![6, 4]),
                ("mlp.shared_expert_gate.weight", vec![1, 6]),
            ]);
            all.extend(experts(3));
        }
        Family::Qwen3Moe | Family::Olmoe => {
            all.extend(attention);
            all.extend([("self_attn.q_norm.weight", vec![2]), ("self_attn.k_norm.weight", vec![2])]);
            all.extend(experts(if family == Family::Olmoe { 5 } else { 3 }));
        }
        _ => {
            all.extend([
                ("self_attn.q_a_proj.weight", vec![5, 6]),
                ("self_attn.q_a_layernorm.weight", vec![5]),
                ("self_attn.q_b_proj.weight", vec![12, 5]),
                ("self_attn.kv_a_proj_with_mqa.weight", vec![6, 6]),
                ("self_attn.kv_a_layernorm.weight", vec![4]),
                ("self_attn.kv_b_proj.weight", vec![15, 4]),
                ("self_attn.o_proj.weight", vec![6, 9]),
                ("mlp.gate.e_score_correction_bias", vec![2]),
                ("mlp.shared_experts.gate_proj.weight", vec![3, 6]),
                ("mlp.shared_experts.up_proj.weight", vec![3, 6]),
                ("mlp.shared_experts.down_proj.weight", vec![6, 3]),
            ]);
            all.extend(experts(3));
        }
    }
    all
}

#[test]
fn every_family_has_its_names_one_for_one() {
    for family in FAMILIES {
        let names = names(family);
        let mut listed: Vec<(String, Vec<usize>)> = names
            .tensors()
            .iter()
            .filter_map(|tensor| {
                Some((tensor.hub.strip_prefix("model.layers.1.")?.to_owned(), tensor.shape.clone()))
            })
            .collect();
        let mut wanted: Vec<(String, Vec<usize>)> =
            layer_1(family).into_iter().map(|(name, shape)| (name.to_owned(), shape)).collect();
        listed.sort();
        wanted.sort();
        assert_eq!(listed, wanted, "{family:?}");
        let tied = family == Family::Qwen3Moe;
        for (name, there) in [
            ("model.embed_tokens.weight", true),
            ("model.norm.weight", true),
            ("lm_head.weight", !tied),
            ("model.layers.0.mlp.gate_proj.weight", !matches!(family, Family::Mixtral | Family::Olmoe)),
        ] {
            assert_eq!(matches!(names.find(name), HubName::Tensor(_)), there, "{family:?}: {name}");
        }
        for tensor in names.tensors() {
            assert_eq!(names.find(&tensor.hub), HubName::Tensor(tensor));
            assert_eq!(names.tensor(&tensor.name), Some(tensor));
            assert_eq!(tensor.shape.iter().product::<usize>(), tensor.len());
            assert_eq!(tensor.buffer, tensor.hub.ends_with("e_score_correction_bias"));
        }
    }
}

/// A file of the format, made by hand: `(name, dtype, shape, bytes)`.
fn file(tensors: &[(&str, &str, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend(bytes);
        entries.push(format!(
            r#"{name:?}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{}]}}"#,
            data.len()
        ));
    }
    with_header(&format!("{{{}}}", entries.join(",")), &data)
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// The value at `n` of the tensor with this name: exact in all types.
fn value(name: &str, n: usize) -> f64 {
    let seed = name.bytes().fold(7usize, |h, b| (h * 31 + b as usize) % 997);
    ((seed + n * 13) % 257) as f64 / 16.0 - 8.0
}

fn encoded(dtype: &str, values: impl Iterator<Item = f64>) -> Vec<u8> {
    values
        .flat_map(|x| match dtype {
            "F64" => x.to_le_bytes().to_vec(),
            "F32" => (x as f32).to_le_bytes().to_vec(),
            "BF16" => bf16::from_f32(x as f32).to_le_bytes().to_vec(),
            "F16" => half::f16::from_f32(x as f32).to_le_bytes().to_vec(),
            _ => vec![0; 4],
        })
        .collect()
}

type Stored = (String, &'static str, Vec<usize>, Vec<u8>);

/// All tensors of a family in `dtype`.
fn stored(family: Family, dtype: &'static str) -> Vec<Stored> {
    let names = names(family);
    let tensor = |t: &moe_model::hf::HubTensor| {
        let values = (0..t.len()).map(|n| value(&t.hub, n));
        (t.hub.clone(), dtype, t.shape.clone(), encoded(dtype, values))
    };
    names.tensors().iter().map(tensor).collect()
}

fn bytes(tensors: &[Stored]) -> Vec<u8> {
    let tensors =
        tensors.iter().map(|(name, dtype, shape, data)| (name.as_str(), *dtype, shape.clone(), data.clone()));
    file(&tensors.collect::<Vec<_>>())
}

/// A folder with one file.
fn single(tensors: &[Stored]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), bytes(tensors)).unwrap();
    folder
}

/// A folder with two files, the second from tensor `cut` on, and an index that `change` may spoil.
fn sharded(tensors: &[Stored], cut: usize, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut weight_map = serde_json::Map::new();
    for (file, tensors) in [("a.safetensors", &tensors[..cut]), ("b.safetensors", &tensors[cut..])] {
        fs::write(folder.path().join(file), bytes(tensors)).unwrap();
        weight_map.extend(tensors.iter().map(|(name, ..)| (name.clone(), json!(file))));
    }
    let mut index = json!({ "metadata": { "total_size": 1 }, "weight_map": weight_map });
    change(&mut index);
    fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    folder
}

fn open(folder: &Path, family: Family) -> Result<HubFolder, WeightsError> {
    HubFolder::open(folder, names(family))
}

#[test]
fn blocks_of_every_type_are_read_in_every_type() {
    for (dtype, float) in
        [("F64", FloatType::F64), ("F32", FloatType::F32), ("BF16", FloatType::Bf16), ("F16", FloatType::F16)]
    {
        let tensors = stored(Family::DeepseekV3, dtype);
        for folder in [single(&tensors), sharded(&tensors, 11, |_| {})] {
            let folder = open(folder.path(), Family::DeepseekV3).unwrap();
            for tensor in folder.names().tensors() {
                let [rows, cols] = tensor.dims;
                assert_eq!(folder.dtype(&tensor.name).unwrap(), float);
                for (rows, cols) in [(0..rows, 0..cols), (rows / 2..rows, cols / 3..cols / 2), (0..1, 0..0)] {
                    let wanted: Vec<f64> = rows
                        .clone()
                        .flat_map(|r| cols.clone().map(move |c| r * tensor.dims[1] + c))
                        .map(|n| value(&tensor.hub, n))
                        .collect();
                    let wide = folder.read::<f64>(&tensor.name, rows.clone(), cols.clone()).unwrap();
                    assert_eq!(wide, wanted, "{} {rows:?} {cols:?}", tensor.name);
                    let single = folder.read::<f32>(&tensor.name, rows.clone(), cols.clone()).unwrap();
                    assert!(single.iter().map(|&x| f64::from(x)).eq(wanted), "{}", tensor.name);
                }
            }
        }
    }
}

/// More than fits a chunk, in whole rows and in parts of them.
#[test]
fn tensors_larger_than_a_chunk_are_read_whole() {
    let mut config = model(Family::Mixtral);
    (config.vocab_size, config.hidden_size) = (4_001, 66);
    let names = HubNames::new(Family::Mixtral, &config).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let plan = WritePlan::new(names.tensors().iter().map(|t| (t, FloatType::F32)), u64::MAX);
    let all = |t: &moe_model::hf::HubTensor| (0..t.len()).map(|n| value(&t.hub, n)).collect::<Vec<f64>>();
    plan.write(folder.path(), |t, sink| sink.put(&all(t))).unwrap();
    let opened = HubFolder::open(folder.path(), names.clone()).unwrap();
    let name = "model.embed_tokens.weight";
    let whole = all(names.tensor(name).unwrap());
    assert_eq!(opened.read::<f64>(name, 0..4_001, 0..66).unwrap(), whole);
    let part: Vec<f64> = (17..3_999).flat_map(|r| whole[r * 66 + 5..r * 66 + 64].to_vec()).collect();
    assert_eq!(opened.read::<f64>(name, 17..3_999, 5..64).unwrap(), part);
}

#[test]
fn what_is_written_is_read_back_sharded_or_not_and_aligned() {
    for family in FAMILIES {
        let names = names(family);
        for max_shard_size in [u64::MAX, 700, 1] {
            // A type for each tensor.
            let types = [FloatType::F32, FloatType::Bf16, FloatType::F64, FloatType::F16];
            let tensors = names.tensors().iter().enumerate().map(|(n, tensor)| (tensor, types[n % 4]));
            let plan = WritePlan::new(tensors.clone(), max_shard_size);
            let folder = tempfile::tempdir().unwrap();
            plan.write(folder.path(), |tensor, sink| {
                let values: Vec<f64> = (0..tensor.len()).map(|n| value(&tensor.hub, n)).collect();
                let (first, rest) = values.split_at(tensor.len() / 3);
                sink.put(first)?;
                sink.put(rest)
            })
            .unwrap();

            let opened = HubFolder::open(folder.path(), names.clone()).unwrap();
            for (tensor, dtype) in tensors {
                assert_eq!(opened.dtype(&tensor.name).unwrap(), dtype);
                let [rows, cols] = tensor.dims;
                let read = opened.read::<f64>(&tensor.name, 0..rows, 0..cols).unwrap();
                assert!(read.into_iter().eq((0..tensor.len()).map(|n| value(&tensor.hub, n))), "{tensor:?}");
            }
            let files: Vec<PathBuf> =
                fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
            let safetensors: Vec<&PathBuf> =
                files.iter().filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
            let mut bytes = 0;
            for path in &safetensors {
                let file = TensorFile::open(path).unwrap();
                let own: u64 = file.tensors.iter().map(|tensor| tensor.bytes).sum();
                assert!(own <= max_shard_size || file.tensors.len() == 1, "{own} bytes");
                for tensor in &file.tensors {
                    assert_eq!(tensor.offset % (tensor.dtype.bitsize() as u64 / 8), 0, "{}", tensor.name);
                }
                let text = fs::read(path).unwrap();
                assert_eq!(safetensors::SafeTensors::deserialize(&text).unwrap().len(), file.tensors.len());
                let (_, metadata) = safetensors::SafeTensors::read_metadata(&text).unwrap();
                assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
                bytes += own;
            }
            assert_eq!(safetensors.len() > 1, max_shard_size < u64::MAX);
            if max_shard_size < u64::MAX {
                let index = fs::read(folder.path().join("model.safetensors.index.json")).unwrap();
                let index: Value = serde_json::from_slice(&index).unwrap();
                assert_eq!(index["metadata"]["total_size"], bytes);
                assert_eq!(index["weight_map"].as_object().unwrap().len(), names.tensors().len());
                let last = format!("model-{0:05}-of-{0:05}.safetensors", safetensors.len());
                assert!(folder.path().join(last).is_file());
            }
        }
    }
}

#[test]
fn what_is_no_number_or_does_not_fit_is_named_with_its_place() {
    let mut tensors = stored(Family::Mixtral, "F32");
    let at = tensors.iter().position(|(name, ..)| name == "lm_head.weight").unwrap();
    for (bad, said) in [
        (f32::NAN, "lm_head.weight has NaN at [2, 4], but weights must be finite"),
        (f32::NEG_INFINITY, "lm_head.weight has -inf at [2, 4], but weights must be finite"),
    ] {
        tensors[at].3[16 * 4..17 * 4].copy_from_slice(&bad.to_le_bytes());
        let folder = single(&tensors);
        let opened = open(folder.path(), Family::Mixtral).unwrap();
        let error = opened.read::<f64>("lm_head.weight", 1..3, 3..6).unwrap_err().to_string();
        assert!(error.ends_with(said), "{error}");
        opened.read::<f64>("lm_head.weight", 0..2, 0..6).unwrap();
    }

    let mut wide = stored(Family::Mixtral, "F64");
    wide[at].3[..8].copy_from_slice(&1e39f64.to_le_bytes());
    let folder = single(&wide);
    let opened = open(folder.path(), Family::Mixtral).unwrap();
    assert_eq!(opened.read::<f64>("lm_head.weight", 0..1, 0..1).unwrap(), [1e39]);
    let error = opened.read::<f32>("lm_head.weight", 0..1, 0..1).unwrap_err().to_string();
    assert!(error.ends_with("lm_head.weight has 1e39 at [0, 0], which is infinite in f32"), "{error}");

    let names = names(Family::Mixtral);
    let written = |values: fn(usize) -> Vec<f64>, dtype| {
        let folder = tempfile::tempdir().unwrap();
        let plan = WritePlan::new(names.tensors().iter().map(|tensor| (tensor, dtype)), u64::MAX);
        let error = plan.write(folder.path(), |tensor, sink| sink.put(&values(tensor.len()))).unwrap_err();
        error.to_string()
    };
    let error = written(|n| (0..n).map(|i| if i == 9 { 7e4 } else { 1.0 }).collect(), FloatType::F16);
    assert!(error.ends_with("has 7e4 at [1, 3], which is infinite in float16"), "{error}");
    let error = written(|n| vec![f64::NAN; n], FloatType::F64);
    assert!(error.ends_with("has NaN at [0, 0], but weights must be finite"), "{error}");
    let error = written(|n| vec![0.0; n - 1], FloatType::F32);
    assert!(error.contains("elements and was given"), "{error}");
}

/// Around every tie of two neighbours, by the neighbours themselves.
#[test]
fn doubles_are_rounded_to_the_nearest_half() {
    let names = names(Family::Mixtral);
    let embedding = names.tensor("model.embed_tokens.weight").unwrap();
    let mut cases = Vec::new();
    for bits in [1u16, 2, 0x3ff, 0x400, 0x3c00, 0x3c01, 0x5555, 0x7bfe, 0x8001, 0xbc07] {
        let (low, high) = (half::f16::from_bits(bits).to_f64(), half::f16::from_bits(bits + 1).to_f64());
        let tie = (low + high) / 2.0;
        let even = if bits % 2 == 0 { low } else { high };
        let [inside, outside] = [tie.to_bits() - 1, tie.to_bits() + 1].map(f64::from_bits);
        cases.extend([(low, low), (inside, low), (tie, even), (outside, high), (high, high)]);
    }
    cases.resize(2 * embedding.len(), (0.0, 0.0));
    for cases in cases.chunks(embedding.len()) {
        let folder = tempfile::tempdir().unwrap();
        let plan = WritePlan::new([(embedding, FloatType::F16)], u64::MAX);
        let values: Vec<f64> = cases.iter().map(|&(x, _)| x).collect();
        plan.write(folder.path(), |_, sink| sink.put(&values)).unwrap();
        let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
        let halves = bytes[bytes.len() - 2 * values.len()..].chunks(2);
        for ((x, want), half) in cases.iter().zip(halves) {
            assert_eq!(half::f16::from_le_bytes(half.try_into().unwrap()).to_f64(), *want, "{x:e}");
        }
    }
}

#[track_caller]
fn refused(folder: &Path, family: Family, parts: &[&str]) {
    let error = open(folder, family).unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "{part:?} in {error:?}");
    }
}

#[test]
fn what_is_not_the_models_is_named() {
    let all = stored(Family::Qwen3Moe, "F32");
    let position = |name: &str| all.iter().position(|(stored, ..)| stored == name).unwrap();
    let changed = |change: &dyn Fn(&mut Vec<Stored>)| {
        let mut tensors = all.clone();
        change(&mut tensors);
        single(&tensors)
    };
    let family = Family::Qwen3Moe;
    let expert = "model.layers.1.mlp.experts.1.down_proj.weight";

    let folder = changed(&|tensors| drop(tensors.remove(position(expert))));
    refused(folder.path(), family, &["has no", expert, "which is [6, 3] in the model"]);
    let folder = changed(&|tensors| tensors[position(expert)].2 = vec![3, 6]);
    refused(folder.path(), family, &["model.safetensors", expert, "is [3, 6], but [6, 3] in the model"]);
    // A vector as a matrix of one row is another shape.
    let folder = changed(&|tensors| tensors[position("model.norm.weight")].2 = vec![1, 6]);
    refused(folder.path(), family, &["model.norm.weight is [1, 6], but [6] in the model"]);
    for (name, hint) in [
        ("model.layers.1.mlp.experts.2.up_proj.weight", "is no tensor of the model"),
        ("model.layers.1.block_sparse_moe.gate.weight", "is no tensor of the model"),
        ("lm_head.weight", "tie_word_embeddings makes the head the embedding"),
        ("model.layers.1.mlp.experts.gate_up_proj", "experts are read one by one"),
        ("model.layers.1.mlp.gate.weight_scale_inv", "quantised weights are not read"),
        ("model.layers.2.eh_proj.weight", "is no tensor of the model"),
    ] {
        let folder = changed(&|tensors| tensors.push((name.to_owned(), "F32", vec![1], vec![0; 4])));
        refused(folder.path(), family, &["model.safetensors: ", name, hint]);
    }
    let folder = changed(&|tensors| {
        let norm = &mut tensors[position("model.norm.weight")];
        (norm.1, norm.3) = ("F8_E4M3", vec![0; 6]);
    });
    refused(folder.path(), family, &["model.norm.weight is of type F8_E4M3, but weights are read from F64"]);
    let folder = changed(&|tensors| {
        let again = tensors[position(expert)].clone();
        tensors.push(again);
    });
    refused(folder.path(), family, &["the header is malformed", expert, "is there twice"]);

    // Known and not read.
    let folder = changed(&|tensors| {
        let name = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
        tensors.push((name, "F32", vec![1], vec![0; 4]));
    });
    assert!(open(folder.path(), family).unwrap().skipped().is_empty());
    let folder = changed(&|tensors| {
        for name in ["eh_proj.weight", "mlp.experts.0.up_proj.weight"] {
            tensors.push((format!("model.layers.2.{name}"), "F32", vec![1], vec![0; 4]));
        }
    });
    let opened = HubFolder::open(folder.path(), names(family).with_next_token_layers(1)).unwrap();
    assert!(matches!(opened.skipped(), [said] if said.contains("the 2 tensors of layer 2, which predicts")));
    let folder = changed(&|tensors| {
        tensors.push(("model.layers.3.enorm.weight".to_owned(), "F32", vec![1], vec![0; 4]));
    });
    let error = HubFolder::open(folder.path(), names(family).with_next_token_layers(1)).unwrap_err();
    assert!(error.to_string().contains("model.layers.3.enorm.weight is no tensor"), "{error}");
}

#[test]
fn an_index_and_its_files_must_agree() {
    let all = stored(Family::Mixtral, "BF16");
    let family = Family::Mixtral;
    let (first, last) = (all[0].0.clone(), all[all.len() - 1].0.clone());
    let at = |name: &str| json!(name);

    let folder = sharded(&all, 4, |index| index["weight_map"][&first] = at("b.safetensors"));
    refused(folder.path(), family, &["b.safetensors has no", &first, "which the index has in it"]);
    let folder = sharded(&all, 4, |index| index["weight_map"][&last] = at("c.safetensors"));
    refused(folder.path(), family, &["c.safetensors is missing: the index has", &last]);
    let folder = sharded(&all, 4, |index| drop(index["weight_map"].as_object_mut().unwrap().remove(&last)));
    refused(folder.path(), family, &["b.safetensors: ", &last, "is missing in the index"]);
    let folder = sharded(&all, 4, |index| index["weight_map"][&last] = at("../b.safetensors"));
    refused(folder.path(), family, &["has", &last, "which is no name of a file in its folder"]);
    let folder = sharded(&all, 4, |index| *index = json!({ "metadata": {} }));
    refused(folder.path(), family, &["index.json: the index is malformed", "weight_map"]);

    let twice = [&all[..], &all[..1]].concat();
    let folder = sharded(&twice, 4, |_| {});
    refused(folder.path(), family, &[&first, "is there twice, in", "a.safetensors and in", "b.safetensors"]);

    let folder = sharded(&all, 4, |_| {});
    fs::write(folder.path().join("model.safetensors"), bytes(&all)).unwrap();
    refused(folder.path(), family, &["has both model.safetensors and model.safetensors.index.json"]);
    let text = r#"{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}"#;
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    fs::write(folder.path().join("model.safetensors.index.json"), text).unwrap();
    refused(folder.path(), family, &["x is there twice"]);

    let empty = tempfile::tempdir().unwrap();
    refused(empty.path(), family, &["has neither model.safetensors nor model.safetensors.index.json"]);
    fs::write(empty.path().join("pytorch_model.bin"), "").unwrap();
    refused(empty.path(), family, &["pytorch_model.bin is not read"]);
}

/// Wherever a file ends too early it is refused; from the end of the header on, the tensor is named.
#[test]
fn a_file_that_is_cut_off_anywhere_is_refused() {
    let tensors = stored(Family::Mixtral, "F16");
    let whole = bytes(&tensors);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let data = whole.len() - tensors.iter().map(|(.., bytes)| bytes.len()).sum::<usize>();
    for length in (0..data).step_by(97).chain(0..12).chain(data - 3..whole.len()) {
        fs::write(&path, &whole[..length]).unwrap();
        let error = open(folder.path(), Family::Mixtral).unwrap_err();
        match length < data {
            true => assert!(matches!(error, WeightsError::Header { .. }), "{length}: {error}"),
            false => assert!(error.to_string().contains(" is cut off: the file has"), "{length}: {error}"),
        }
    }
    fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
    refused(folder.path(), Family::Mixtral, &["the header describes", "bytes of"]);

    // Cut off after it was opened.
    fs::write(&path, &whole).unwrap();
    let opened = open(folder.path(), Family::Mixtral).unwrap();
    fs::write(&path, &whole[..data]).unwrap();
    let error = opened.read::<f32>("model.norm.weight", 0..1, 0..6).unwrap_err();
    assert!(matches!(error, WeightsError::Io { .. }), "{error}");
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let most = usize::MAX;
    let (elements, size) = ((1u64 << 58) - 1, (1u64 << 61) - 8);
    let eight = ["a", "b", "c", "d", "e", "f", "g", "h"].iter().zip(0..).map(|(name, n)| {
        let offsets = [n * size, (n + 1) * size];
        format!(r#""{name}":{{"dtype":"F64","shape":[{elements}],"data_offsets":{offsets:?}}}"#)
    });
    let eight = format!("{{{}}}", eight.collect::<Vec<_>>().join(","));
    for (header, said) in [
        ("[]".to_owned(), "invalid type: sequence, expected tensors by name"),
        ("{".to_owned(), "the header is malformed: EOF"),
        ("{} x".to_owned(), "trailing characters"),
        (entry("F9", "[2]", "[0,8]"), "x: unknown variant `F9`"),
        (entry("F32", "[-2]", "[0,8]"), "x: invalid value: integer `-2`"),
        (entry("F32", "[2]", "[0,8,9]"), "x: "),
        (entry("F32", "[2]", "[0]"), "x: "),
        (entry("F32", "[2]", "[0,7]"), "x is [2] F32, 8 bytes, but has the bytes 0..7"),
        (entry("F32", "[2]", "[8,0]"), "x has its bytes at 8, but there is a gap before it"),
        (entry("F32", "[2]", "[4,12]"), "x has its bytes at 4, but there is a gap before it"),
        (entry("F4", "[1]", "[0,0]"), "x is [1] F4, which is no whole number of bytes"),
        (entry("F32", &format!("[{most}, 3]"), "[0,8]"), "which is no whole number of bytes that fits"),
        (entry("F32", "[1000000000000, 1000]", "[0,8]"), "4000000000000000 bytes, but has the bytes 0..8"),
        (eight, "h would end at byte 18446744073709551552 of the data"),
        (entry("F64", "[288230376151711743]", "[0,2305843009213693944]"), "x is cut off: the file has"),
        (
            r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"y":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#
                .to_owned(),
            "y has its bytes at 2, but there is another one in its place",
        ),
        (entry("F32", "[1]", "[0,4]"), "describes"),
    ] {
        fs::write(&path, with_header(&header, &[0; 8])).unwrap();
        let error = TensorFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(said), "{said:?} in {error:?}");
    }
    for (length, said) in [
        (9u64, "has 9 bytes, but the file ends 8 after its length"),
        (100_000_001, "would have 100000001 bytes, more than 100000000"),
        (u64::MAX, "would have 18446744073709551615 bytes"),
    ] {
        fs::write(&path, [&length.to_le_bytes()[..], b"{}      "].concat()).unwrap();
        let error = TensorFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(said), "{said:?} in {error:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// A file with any bytes changed is read or refused, and what is read is inside of it.
    #[test]
    fn damaged_files_are_read_or_refused(places in prop::collection::vec((0usize..4000, any::<u8>()), 1..6)) {
        let mut whole = bytes(&stored(Family::Olmoe, "F32"));
        for (at, byte) in places {
            let at = at % whole.len();
            whole[at] = byte;
        }
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("model.safetensors"), &whole).unwrap();
        if let Ok(opened) = open(folder.path(), Family::Olmoe) {
            for tensor in opened.names().tensors() {
                let [rows, cols] = tensor.dims;
                let _ = opened.read::<f32>(&tensor.name, 0..rows, 0..cols);
            }
        }
    }
}
