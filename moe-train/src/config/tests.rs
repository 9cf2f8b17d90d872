use moe_dispatch::capacity::DropPolicy;
use moe_model::{DropUnit, ExpertCapacity, ForcedRouting};
use moe_pipeline::generate::Named;
use moe_topology::{Attention, Expert};

use super::*;

const SMALL: &str = r#"
[model]
vocab_size = 256
hidden_size = 64
intermediate_size = 96
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
num_local_experts = 8
num_experts_per_tok = 2

[parallel]
world_size = 8
tp = 2
pp = 2
ep = 4

[train]
steps = 100
global_batch_size = 8
micro_batch_size = 2
sequence_length = 64
output = "runs/small"

[data]
files = ["src/**/*.rs"]
"#;

fn with(overrides: &[&str]) -> Result<RunConfig, ConfigError> {
    RunConfig::parse(SMALL, "small.toml", overrides)
}

fn refusal(overrides: &[&str]) -> String {
    with(overrides).unwrap_err().to_string()
}

#[test]
fn defaults_are_filled_in_and_the_resolved_file_reads_back() {
    let config = with(&["train.seed=7", "sample.prompt=a \"quoted\"\nprompt", "optimizer.lr=0.1"]).unwrap();
    assert_eq!(config.parallel.order, "tp-cp-ep-dp-pp");
    assert_eq!(config.parallel.etp, 1);
    assert_eq!(config.optimizer.decay_steps, Some(100));
    assert_eq!(config.lr_schedule().at(100), config.optimizer.min_lr);
    let text = config.to_toml().unwrap();
    assert!(text.contains("beta2 = 0.95") && text.contains("dispatcher = \"all-to-all\""), "{text}");
    assert_eq!(RunConfig::parse(&text, "resolved", &[] as &[&str]).unwrap(), config);
}

#[test]
fn unknown_keys_get_the_nearest_name_or_their_table() {
    assert_eq!(
        refusal(&["model.num_expert_per_tok=2"]),
        "unknown key \"num_expert_per_tok\" in [model]; did you mean \"num_experts_per_tok\"?"
    );
    assert_eq!(
        refusal(&["train.warmup_steps=2"]),
        "unknown key \"warmup_steps\" in [train]; it belongs in [optimizer]"
    );
    assert_eq!(
        refusal(&["optimiser.lr=2"]),
        "unknown key \"optimiser\" in small.toml; did you mean \"optimizer\"?"
    );
    assert_eq!(refusal(&["train.zzz=2"]), "unknown key \"zzz\" in [train]");
    let top = RunConfig::parse(&format!("steps = 3\n{SMALL}"), "small.toml", &[] as &[&str]).unwrap_err();
    assert_eq!(top.to_string(), "unknown key \"steps\" in small.toml; it belongs in [train]");
}

#[test]
fn wrong_types_and_missing_keys_name_table_and_key() {
    assert_eq!(refusal(&["train.steps=many"]), "[train] steps: invalid type: string \"many\", expected u64");
    assert_eq!(
        refusal(&["train.dtype=f16"]),
        "[train] dtype: unknown variant `f16`, expected one of `f32`, `f64`, `bf16`"
    );
    assert_eq!(
        refusal(&["data.files=a.txt"]),
        "[data] files: invalid type: string \"a.txt\", expected a sequence"
    );
    assert!(refusal(&["train.steps=-1"]).starts_with("[train] steps: invalid value: integer `-1`"));
    let missing =
        RunConfig::parse(&SMALL.replace("steps = 100\n", ""), "small.toml", &[] as &[&str]).unwrap_err();
    assert_eq!(missing.to_string(), "[train]: missing field `steps`");
    let scalar = RunConfig::parse("model = 3", "small.toml", &[] as &[&str]).unwrap_err();
    assert_eq!(scalar.to_string(), "[model]: a table was expected, not the integer 3");
}

#[test]
fn what_is_no_toml_is_refused_with_its_line() {
    let error = RunConfig::parse("[train]\nsteps 3\n", "bad.toml", &[] as &[&str]).unwrap_err().to_string();
    assert!(error.starts_with("bad.toml is not valid TOML: TOML parse error at line 2"), "{error}");
}

#[test]
fn ranges() {
    for (text, start) in [
        ("train.steps=0", "train.steps = 0, but it must be at least 1"),
        ("train.micro_batch_size=0", "train.micro_batch_size = 0"),
        ("train.deadline_seconds=0", "train.deadline_seconds = 0"),
        ("train.peak_tflops=0", "train.peak_tflops = 0, but it must be finite and above 0"),
        ("train.peak_tflops=inf", "train.peak_tflops = inf"),
        ("optimizer.lr=nan", "optimizer.lr = NaN"),
        ("optimizer.min_lr=1.0", "optimizer.min_lr = 1, but it must be from 0 to optimizer.lr = 0.001"),
        (
            "optimizer.warmup_steps=101",
            "optimizer.warmup_steps = 101, but it must be at most optimizer.decay_steps = 100",
        ),
        ("optimizer.beta2=1.0", "optimizer.beta2 = 1, "),
        ("optimizer.eps=1e-9", "optimizer.eps = 0.000000001, "),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay = -1"),
        ("optimizer.clip_grad=inf", "optimizer.clip_grad = inf"),
        ("data.files=[]", "data.files = [], "),
        ("data.held_out=1", "data.held_out = 1, "),
        ("model.vocab_size=255", "model.vocab_size = 255, but it must be at least 256 for data.tokenizer"),
        ("sample.prompt=", "sample.prompt = \"\""),
        ("sample.temperature=-0.1", "sample.temperature = -0.1"),
        ("model.rms_norm_eps=0", "[model] rms_norm_eps = 0"),
    ] {
        let error = refusal(&[text]);
        assert!(error.starts_with(start), "{text}: {error}");
    }
}

#[test]
fn learning_rate_schedules_are_chosen_by_name() {
    let lr = |name: &str, more: &[&str]| {
        let name = format!("optimizer.lr_schedule={name}");
        let common = ["optimizer.lr=0.5", "optimizer.min_lr=0.25", "optimizer.warmup_steps=4", &name];
        let config = with(&[&common, more].concat()).unwrap();
        let text = config.to_toml().unwrap();
        assert_eq!(RunConfig::parse(&text, "resolved", &[] as &[&str]).unwrap(), config);
        config.lr_schedule()
    };
    assert_eq!((lr("constant", &[]).at(100), lr("constant", &[]).at(2)), (0.5, 0.25));
    assert_eq!(lr("linear", &[]).at(52), 0.375);
    assert_eq!(lr("linear", &["optimizer.decay_steps=12"]).at(8), 0.375);
    assert!((lr("cosine", &[]).at(52) - 0.375).abs() < 1e-15);
    assert_eq!(
        (lr("inverse-square-root", &[]).at(9), lr("inverse-square-root", &[]).at(100)),
        (1.0 / 3.0, 0.25)
    );
    let stable =
        |style: &[&str]| lr("warmup-stable-decay", &[&["optimizer.wsd_decay_steps=16"], style].concat());
    assert_eq!((stable(&[]).at(84), stable(&[]).at(92), stable(&[]).at(100)), (0.5, 0.375, 0.25));
    assert_eq!(stable(&["optimizer.wsd_decay_style=minus-sqrt"]).at(88), 0.375);
}

#[test]
fn settings_of_another_learning_rate_schedule_are_refused() {
    for (overrides, refused) in [
        (
            &["optimizer.lr_schedule=constant", "optimizer.decay_steps=9"] as &[_],
            "optimizer.decay_steps has no meaning with optimizer.lr_schedule = \"constant\": remove it",
        ),
        (
            &["optimizer.lr_schedule=linear", "optimizer.wsd_decay_steps=9"],
            "optimizer.wsd_decay_steps has no meaning with optimizer.lr_schedule = \"linear\": remove it",
        ),
        (
            &["optimizer.wsd_decay_style=linear"],
            "optimizer.wsd_decay_style has no meaning with optimizer.lr_schedule = \"cosine\": remove it",
        ),
        (
            &["optimizer.lr_schedule=warmup-stable-decay"],
            "optimizer.wsd_decay_steps is needed with optimizer.lr_schedule = \"warmup-stable-decay\": set it to \
             the length of the decay that ends at step 100",
        ),
        (
            &[
                "optimizer.lr_schedule=warmup-stable-decay",
                "optimizer.warmup_steps=90",
                "optimizer.wsd_decay_steps=11",
            ],
            "optimizer.wsd_decay_steps = 11, but it must be from 1 to 10, which is optimizer.decay_steps - \
             optimizer.warmup_steps",
        ),
    ] {
        assert_eq!(refusal(overrides), refused);
    }
    assert!(
        refusal(&["optimizer.lr_schedule=wsd"])
            .contains("unknown variant `wsd`, expected one of `constant`, ")
    );
}

#[test]
fn a_capacity_fills_in_how_tokens_are_dropped_and_keeps_the_parts_under_another_mapping() {
    assert_eq!(with(&[]).unwrap().capacity(), None);
    let factor = "train.moe_expert_capacity_factor=1.25";
    let full = with(&[factor]).unwrap();
    let unit = DropUnit::MICRO_BATCH;
    assert_eq!(
        full.capacity(),
        Some(ExpertCapacity { factor: 1.25, policy: DropPolicy::Probs, unit, pad: false })
    );
    let written = full.to_toml().unwrap();
    assert!(
        written.contains("moe_token_drop_policy = \"probs\"\nmoe_token_drop_scope = \"full\"\n"),
        "{written}"
    );

    let pad = "train.moe_pad_expert_input_to_capacity=true";
    let sub = with(&[factor, pad, "train.moe_token_drop_scope=sub", "train.moe_token_drop_policy=position"])
        .unwrap();
    let unit = DropUnit { tp: 2, cp: 1 };
    let capacity = Some(ExpertCapacity { factor: 1.25, policy: DropPolicy::Position, unit, pad: true });
    assert_eq!(sub.capacity(), capacity);
    let written = sub.to_toml().unwrap();
    let again = RunConfig::parse(&written, "config.toml", &["parallel.tp=1"]).unwrap();
    assert_eq!((again.parallel.tp, again.capacity()), (1, capacity));
}

#[test]
fn keys_of_dropping_that_do_not_fit_are_refused() {
    let factor = "train.moe_expert_capacity_factor=1.25";
    for (overrides, refused) in [
        (
            &["train.moe_token_drop_policy=position"] as &[&str],
            "train.moe_token_drop_policy has no meaning with experts of unlimited capacity: set train.moe_expert_capacity_factor, \
             or remove it",
        ),
        (
            &["train.moe_token_drop_scope=sub"],
            "train.moe_token_drop_scope has no meaning with experts of unlimited capacity: set train.moe_expert_capacity_factor, \
             or remove it",
        ),
        (
            &["train.moe_pad_expert_input_to_capacity=true"],
            "train.moe_pad_expert_input_to_capacity has no meaning with experts of unlimited capacity: set \
             train.moe_expert_capacity_factor, or remove it",
        ),
        (
            &["train.moe_expert_capacity_factor=0"],
            "train.moe_expert_capacity_factor = 0, but it must be finite and above 0",
        ),
        (
            &[factor, "train.moe_token_drop_parts={tp = 2, cp = 1}"],
            "train.moe_token_drop_parts has no meaning with train.moe_token_drop_scope = \"full\": set the scope to \
             \"sub\", or remove the parts",
        ),
        (
            &[factor, "train.moe_token_drop_scope=sub", "train.moe_token_drop_parts={tp = 3, cp = 1}"],
            "[train] moe_token_drop_parts: sequences of 64 tokens cannot be cut into drop units of tp = 3 and cp = 1: \
             give sizes for which (64/cp) % tp = 0",
        ),
        (
            &["train.moe_expert_rank_capacity_factor=0.9"],
            "train.moe_expert_rank_capacity_factor = 0.9, but it must be finite and at least 1, what a rank receives if \
             experts are chosen equally often",
        ),
        (
            &[
                factor,
                "train.moe_pad_expert_input_to_capacity=true",
                "train.moe_expert_rank_capacity_factor=1.5",
            ],
            "train.moe_expert_rank_capacity_factor has no meaning with train.moe_pad_expert_input_to_capacity = true: \
             ranks receive equally many rows already; remove one of them",
        ),
        (
            &["train.moe_expert_rank_capacity_factor=1.5", "model.first_k_dense_replace=4"],
            "train.moe_expert_rank_capacity_factor has no meaning with a model without experts: remove it",
        ),
        (
            &[factor, "model.first_k_dense_replace=4"],
            "train.moe_expert_capacity_factor has no meaning with a model without experts: remove it",
        ),
    ] {
        assert_eq!(refusal(overrides), refused);
    }
    let unknown = refusal(&[factor, "train.moe_token_drop_policy=random"]);
    assert!(unknown.contains("unknown variant `random`, expected `probs` or `position`"), "{unknown}");
}

#[test]
fn non_finite_steps_have_a_limit_if_they_are_skipped() {
    let limit = |overrides: &[&str]| with(overrides).unwrap().train.non_finite_limit();
    assert_eq!(limit(&[]), 10);
    assert_eq!(limit(&["train.non_finite_limit=3"]), 3);
    assert_eq!(limit(&["train.non_finite=stop"]), 0);
    assert_eq!(
        refusal(&["train.non_finite=stop", "train.non_finite_limit=3"]),
        "train.non_finite_limit has no meaning with train.non_finite = \"stop\": remove it"
    );
    assert_eq!(
        refusal(&["train.non_finite_limit=0"]),
        "train.non_finite_limit = 0, but it must be at least 1"
    );
    assert!(
        refusal(&["train.non_finite=ignore"]).contains("unknown variant `ignore`, expected `skip` or `stop`")
    );
}

#[test]
fn parameter_groups_are_checked_against_the_model() {
    let groups = |text: &str| with(&[&format!("optimizer.groups=[{text}]")]);
    let config =
        groups("{match = '*.experts.*', lr_scale = 0.5}, {match = '*embed*', frozen = true}").unwrap();
    assert_eq!((config.optimizer.groups.len(), config.optimizer.groups[1].frozen), (2, true));
    let text = config.to_toml().unwrap();
    assert!(text.contains("[[optimizer.groups]]\nmatch = \"*.experts.*\"\nlr_scale = 0.5\n"), "{text}");
    assert_eq!(RunConfig::parse(&text, "resolved", &[] as &[&str]).unwrap(), config);

    for (text, refused) in [
        (
            "{match = 'model.layers.*.mlp.experts.*.w2.weight', frozen = true}",
            "[[optimizer.groups]] match = \"model.layers.*.mlp.experts.*.w2.weight\" matches no tensor; the nearest are \
             model.layers.*.block_sparse_moe.experts.*.w2.weight, ",
        ),
        ("{match = '*', frozen = true}", "[[optimizer.groups]] all tensors are frozen"),
        (
            "{match = '*', lr_scal = 2}",
            "[optimizer] groups: unknown field `lr_scal`, expected one of `match`, ",
        ),
        ("{lr_scale = 2}", "[optimizer] groups: missing field `match`"),
    ] {
        let error = groups(text).unwrap_err().to_string();
        assert!(error.starts_with(refused), "{error}");
    }
}

#[test]
fn the_rate_of_an_expert_bias_needs_one() {
    let bias = ["model.moe_router_enable_expert_bias=true", "model.scoring_func=sigmoid"];
    assert_eq!(with(&[]).unwrap().optimizer.moe_router_bias_update_rate, None);
    assert_eq!(with(&bias).unwrap().optimizer.moe_router_bias_update_rate, Some(0.001));
    let rate = |rate| [&bias[..], &[rate]].concat();
    let frozen = with(&rate("optimizer.moe_router_bias_update_rate=0")).unwrap();
    assert_eq!(frozen.optimizer.moe_router_bias_update_rate, Some(0.0));
    assert_eq!(
        refusal(&rate("optimizer.moe_router_bias_update_rate=-1")),
        "optimizer.moe_router_bias_update_rate = -1, but it must be finite and at least 0"
    );
    assert_eq!(
        refusal(&["optimizer.moe_router_bias_update_rate=0.1"]),
        "optimizer.moe_router_bias_update_rate has no meaning with model.moe_router_enable_expert_bias = false: remove \
         it, or set the latter to true"
    );
}

#[test]
fn forced_loads_are_refused_where_they_make_no_sense() {
    assert_eq!(with(&[]).unwrap().forced_routing(), None);
    let (balance, skew) = ("train.moe_router_force_load_balancing=true", "train.moe_router_force_skew=1.5");
    assert_eq!(with(&[balance]).unwrap().forced_routing(), Some(ForcedRouting::Balanced));
    let skewed = Some(ForcedRouting::Skewed { exponent: 1.5 });
    assert_eq!(with(&[skew]).unwrap().forced_routing(), skewed);
    let bias = ["model.moe_router_enable_expert_bias=true", "model.scoring_func=sigmoid"];
    for (overrides, refused) in [
        (
            &[balance, skew][..],
            "train.moe_router_force_skew contradicts itself with train.moe_router_force_load_balancing = true: remove one \
             of them",
        ),
        (
            &["train.moe_router_force_skew=-1"],
            "train.moe_router_force_skew = -1, but it must be from 0 (all alike) to 100",
        ),
        (
            &[&[balance][..], &bias].concat(),
            "train.moe_router_force_load_balancing makes no sense with model.moe_router_enable_expert_bias = true: the \
             bias would follow choices it has no part in; remove one",
        ),
        (
            &[skew, "model.n_group=4", "model.topk_group=2"],
            "train.moe_router_force_skew makes no sense with model.n_group = 4: forced choices keep to no groups; set \
             model.n_group to 1",
        ),
        (
            &[balance, "model.moe_router_sinkhorn_iterations=8", "model.router_aux_loss_coef=0"],
            "train.moe_router_force_load_balancing contradicts itself with model.moe_router_sinkhorn_iterations: both \
             choose the experts; remove one",
        ),
        (
            &[balance, "model.first_k_dense_replace=4"],
            "train.moe_router_force_load_balancing has no meaning with a model without experts: remove it",
        ),
    ] {
        assert_eq!(refusal(overrides), refused);
    }
}

#[test]
fn routing_is_recorded_or_replayed_or_forced() {
    let replay = "train.replay_routing=runs/other/routing";
    for (overrides, refused) in [
        (
            &[replay, "train.record_routing=true"][..],
            "train.replay_routing makes no sense with train.record_routing = true: they are the same; remove one",
        ),
        (
            &[replay, "train.moe_router_force_skew=1"],
            "train.replay_routing contradicts itself with forced routing: remove one of them",
        ),
        (
            &["train.record_routing=true", "model.first_k_dense_replace=4"],
            "train.record_routing has no meaning with a model without experts: remove it",
        ),
    ] {
        assert_eq!(refusal(overrides), refused);
    }
    with(&["train.record_routing=true", "train.moe_router_force_load_balancing=true"]).unwrap();
}

#[test]
fn later_milestones_are_refused_by_name() {
    let window = ["parallel.cp=2", "model.sliding_window=8"];
    assert_eq!(
        refusal(&window),
        "model.sliding_window = 8 with parallel.cp = 2 and parallel.cp_ulysses = 1 is not supported in training yet: \
         set parallel.cp_ulysses to parallel.cp (all-to-all alone), or leave the window out"
    );
    with(&[&window[..], &["parallel.cp_ulysses=2"]].concat()).unwrap();
}

#[test]
fn examples_are_accepted() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let files = glob::glob(&format!("{}/gpu/*.toml", examples.display())).unwrap().map(Result::unwrap);
    let files: Vec<_> = files
        .chain(["quickstart", "larger"].map(|name| examples.join(name).with_extension("toml")))
        .collect();
    assert!(files.len() > 4, "{files:?}");
    for path in files {
        RunConfig::load(&path, &[] as &[&str]).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

#[test]
fn gpus_train_folded_and_bf16_needs_them() {
    let alone = ["parallel.world_size=1", "parallel.tp=1", "parallel.pp=1", "parallel.ep=1"];
    let on_gpu = |more: &[&'static str]| [&["train.device=cuda"][..], more].concat();
    assert_eq!(with(&on_gpu(&["train.dtype=bf16"])).unwrap().folding().unwrap().world_size(), 8);
    let bf16 = [&["train.dtype=bf16"], &alone[..]].concat();
    assert_eq!(
        refusal(&bf16),
        "train.dtype = \"bf16\" cannot be used with train.device = \"cpu\": train in f32, or set train.device = \"cuda\""
    );
    let config = with(&on_gpu(&bf16)).unwrap();
    assert_eq!((config.train.device, config.train.dtype), (DeviceKind::Cuda, TrainDType::Bf16));
    assert_eq!(config.train.dtype.master().name(), "f32");
    assert!(config.train.deterministic);
    assert!(
        !with(&on_gpu(&[&alone[..], &["train.deterministic=false"]].concat())).unwrap().train.deterministic
    );
    assert_eq!(
        refusal(&["train.deterministic=false"]),
        "train.deterministic = false has no meaning with train.device = \"cpu\": remove it"
    );
    assert_eq!(RunConfig::parse(&config.to_toml().unwrap(), "resolved", &[] as &[&str]).unwrap(), config);
}

#[test]
fn virtual_stages_and_layers_that_do_not_fit_are_refused() {
    // Two micro-batches per data-parallel rank.
    assert_eq!(with(&["parallel.vpp=2"]).unwrap().pipeline().unwrap().virtual_stages(), 2);
    let uneven = with(&["parallel.vpp=2", "parallel.layers_per_stage=[1, 1, 2, 0]"]).unwrap();
    assert_eq!(uneven.pipeline().unwrap().layers(2), 2..4);
    assert_eq!(with(&["parallel.layers_per_stage=[3, 1]"]).unwrap().pipeline().unwrap().layers(0), 0..3);
    let text = with(&["parallel.vpp=2", "parallel.pipeline_layout='E(t|)*2t*2|L'"]).unwrap();
    assert_eq!(text.pipeline().unwrap(), uneven.pipeline().unwrap());
    assert_eq!(RunConfig::parse(&text.to_toml().unwrap(), "written", &[] as &[&str]).unwrap(), text);
    // More stages than layers, since two have none.
    let thin = ["parallel.world_size=8", "parallel.pp=4", "parallel.ep=1", "model.num_hidden_layers=2"];
    with(&[&thin[..], &["parallel.pipeline_layout='E|t|t|L'"]].concat()).unwrap();
    for (overrides, text) in [
        (
            &["parallel.pp=1", "parallel.vpp=2"][..],
            "[parallel] illegal mapping: vpp > 1 (interleaved stages) needs pp > 1",
        ),
        (
            &["parallel.vpp=3"],
            "[parallel] illegal mapping: num_hidden_layers must be at least pp·vpp, but 4 < 2·3 = 6",
        ),
        (
            &["parallel.vpp=2", "train.global_batch_size=4"],
            "[parallel] 2 virtual stages on 2 ranks cannot take 1 micro-batches in groups of 2: groups have at least 2 (the \
             ranks), the last one too, and at most all micro-batches (one group of all may have fewer, but leaves ranks \
             without work); the nearest numbers of micro-batches: 2, where a step has global_batch_size / (micro_batch_size · dp) micro-batches",
        ),
        (
            &["parallel.vpp=2", "parallel.micro_batch_group_size=3"],
            "[parallel] 2 virtual stages on 2 ranks cannot take 2",
        ),
        (
            &["parallel.micro_batch_group_size=2"],
            "parallel.micro_batch_group_size = 2, but it must be left out where parallel.vpp = 1",
        ),
        (
            &["parallel.layers_per_stage=[1, 1, 2, 0]"],
            "parallel.layers_per_stage = [1, 1, 2, 0], but it must be a list of pp·vpp = 2 numbers",
        ),
        (
            &["parallel.layers_per_stage=[1, 2]"],
            "[parallel] layers_per_stage: the stages have 3 layers, but the model has 4",
        ),
        (
            &["parallel.vpp=2", "parallel.layers_per_stage=[2, 0, 1, 1]"],
            "[parallel] layers_per_stage: stage 1 has no layer",
        ),
        (
            &["parallel.pipeline_layout='Et|m|L'"],
            "[parallel] pipeline_layout: column 4: prediction of several tokens (m) is not built: leave it out\n  Et|m|L\n     ^",
        ),
        (
            &["parallel.pipeline_layout='Et*2|t*3L'"],
            "[parallel] pipeline_layout: the stages have 5 layers, but the model has 4",
        ),
        (
            &["parallel.pipeline_layout='Et|t|t|tL'"],
            "parallel.pipeline_layout = \"Et|t|t|tL\", but it must be a layout of pp·vpp = 2 stages, not of 4 \
             (parallel.vpp = 2)",
        ),
        (
            &["parallel.pipeline_layout='Et*4|L'", "parallel.layers_per_stage=[4, 0]"],
            "parallel.pipeline_layout says the same with parallel.layers_per_stage = [4, 0]: leave one of them out",
        ),
    ] {
        let error = refusal(overrides);
        assert!(error.starts_with(text), "{overrides:?}: {error}");
    }
}

#[test]
fn schedules_are_chosen_by_name_and_fit_the_stages() {
    let chosen = |overrides: &[&str]| with(overrides).unwrap().parallel.schedule().unwrap();
    for (overrides, schedule) in [
        (&[][..], Named::OneFOneB),
        (&["parallel.vpp=2"], Named::Interleaved1F1B),
        (&["parallel.schedule=zb-h1"], Named::ZbH1),
        (&["parallel.schedule=GPipe"], Named::GPipe),
        (&["parallel.schedule=LoopedBFS", "parallel.vpp=2"], Named::BreadthFirst),
        (&["parallel.schedule=interleaved-zero-bubble"], Named::InterleavedZeroBubble),
        (&["parallel.schedule=ZBVZeroBubble", "parallel.vpp=2"], Named::ZbV),
        // One micro-batch.
        (&["parallel.schedule=overlapped-1f1b", "train.global_batch_size=4"], Named::Overlapped1F1B),
    ] {
        assert_eq!(chosen(overrides), schedule, "{overrides:?}");
    }
    let v_shaped = with(&["parallel.schedule=v-min", "parallel.vpp=2"]).unwrap().pipeline().unwrap();
    assert!(v_shaped.stages_of(0).eq([0, 3]) && v_shaped.ends() == [0, 0]);
    let written = with(&["parallel.schedule=LoopedBFS", "parallel.vpp=2"]).unwrap();
    assert!(written.to_toml().unwrap().contains("schedule = \"breadth-first\""));
    assert_eq!(RunConfig::parse(&written.to_toml().unwrap(), "written", &[] as &[&str]).unwrap(), written);
    for (overrides, text) in [
        (
            &["parallel.schedule=zb"][..],
            "[parallel] schedule: \"zb\" is no schedule; there are gpipe, 1f1b, breadth-first,",
        ),
        (
            &["parallel.schedule=gpipe", "parallel.vpp=2"],
            "parallel.vpp = 2, but it must be 1 with parallel.schedule = \"gpipe\"",
        ),
        (
            &["parallel.schedule=v-half"],
            "parallel.vpp = 1, but it must be 2 with parallel.schedule = \"v-half\"",
        ),
        (
            &["parallel.schedule=dual-pipe-v", "parallel.vpp=2"],
            "[parallel] DualPipeV on 2 ranks cannot take 2 micro-batches: it needs at least 4, where a step has \
             global_batch_size / (micro_batch_size · dp) micro-batches",
        ),
        (
            &["parallel.schedule=dual-pipe"],
            "parallel.schedule = \"dual-pipe\" is not supported in training yet: it keeps two copies of each stage's weights",
        ),
        (
            &["parallel.schedule=breadth-first", "parallel.vpp=2", "parallel.micro_batch_group_size=2"],
            "parallel.micro_batch_group_size has no meaning with parallel.schedule = \"breadth-first\": remove it",
        ),
        (
            &["parallel.schedule=interleaved-zero-bubble", "parallel.vpp=2", "train.global_batch_size=4"],
            "[parallel] 2 virtual stages on 2 ranks cannot take 1 micro-batches in groups of 2",
        ),
    ] {
        let error = refusal(overrides);
        assert!(error.starts_with(text), "{overrides:?}: {error}");
    }
}

#[test]
fn context_parallelism_is_a_ring_unless_ulysses_is_asked_for() {
    let folding = |overrides: &[&str]| with(overrides).unwrap().folding().unwrap();
    for (overrides, ulysses, ring) in [
        (&["parallel.cp=2"][..], 1, 2),
        (&["parallel.cp=2", "parallel.cp_ulysses=2"], 2, 1),
        (&["parallel.tp=1", "parallel.cp=4", "parallel.cp_ulysses=2"], 2, 2),
    ] {
        let folding = folding(overrides);
        assert_eq!(folding.size(Attention::CP_INNER), ulysses);
        assert_eq!(folding.size(Attention::CP_OUTER), ring);
    }
    assert!(refusal(&["parallel.cp_ulysses=0"]).contains("cp_ulysses must be at least 1, but is 0\n"));
    for (overrides, rule) in [
        (
            &["parallel.cp=2", "train.sequence_length=66"][..],
            "sequence_length must be a multiple of 2·cp, but 66 % (2·2 = 4) = 2",
        ),
        (&["parallel.cp=2", "parallel.cp_ulysses=4"], "cp must be a multiple of cp_ulysses, but 2 % 4 = 2"),
        (
            &["parallel.cp=2", "parallel.cp_ulysses=2", "model.num_attention_heads=6", "model.head_dim=16"],
            "num_attention_heads must be a multiple of tp·cp_ulysses, but 6 % (2·2 = 4) = 2",
        ),
    ] {
        let error = refusal(overrides);
        assert!(error.starts_with(&format!("[parallel] illegal mapping: {rule}\n")), "{error}");
        assert!(error.contains("nearest legal mappings of world_size 8:"), "{error}");
    }
}

#[test]
fn illegal_mappings_are_refused_with_the_equation() {
    for (text, equation) in [
        ("parallel.ep=3", "world_size"),
        ("parallel.tp=4", ""),
        ("parallel.etp=5", "world_size"),
        ("model.num_local_experts=6", "num_experts must be a multiple of ep, but 6 %"),
        ("train.global_batch_size=6", "global_batch_size must be a multiple of"),
        ("train.sequence_length=63", "sequence_length"),
        ("model.num_hidden_layers=1", "num_hidden_layers"),
        ("parallel.order=tp-xx", "unknown axis \"xx\""),
    ] {
        match with(&[text]) {
            Err(error) => {
                let error = error.to_string();
                assert!(error.starts_with("[parallel] ") && error.contains(equation), "{text}: {error}");
            }
            // TP 4 with 2 key-value heads: each has two replicas.
            Ok(_) => assert_eq!(equation, "", "{text}"),
        }
    }
}

#[test]
fn a_file_that_is_missing_is_named() {
    let error = RunConfig::load(Path::new("no/such.toml"), &[] as &[&str]).unwrap_err().to_string();
    assert!(error.starts_with("cannot read no/such.toml: "), "{error}");
}

#[test]
fn a_batch_that_grows_fits_the_folding_at_every_step() {
    let ramp = |start: usize, increment: usize, samples: u64| {
        format!("train.rampup_batch_size={{ start = {start}, increment = {increment}, samples = {samples} }}")
    };
    // DP 2, micro-batches of 2 sequences.
    let config = with(&["train.global_batch_size=16", &ramp(4, 4, 20)]).unwrap();
    assert_eq!(config.train.batch_sizes().unwrap().sizes().collect::<Vec<_>>(), [4, 8, 12, 16]);
    let text = config.to_toml().unwrap();
    assert_eq!(RunConfig::parse(&text, "resolved", &[] as &[&str]).unwrap(), config);
    assert_eq!(with(&[]).unwrap().train.batch_sizes().unwrap().sizes().collect::<Vec<_>>(), [8]);

    let refused = |overrides: &[&str], text: &str| {
        let error = refusal(overrides);
        assert!(error.starts_with(text), "{overrides:?}: {error}");
    };
    let at = "[train] rampup_batch_size: ";
    refused(&[&ramp(0, 4, 9)], &format!("{at}start = 0, but it must be at least 1"));
    refused(&[&ramp(8, 4, 9)], &format!("{at}start = 8, but it must be below global_batch_size = 8"));
    refused(
        &["train.global_batch_size=16", &ramp(4, 8, 9)],
        &format!("{at}global_batch_size - start must be a multiple of increment, but (16 - 4) % 8 = 4"),
    );
    refused(
        &["train.global_batch_size=16", &ramp(2, 2, 9)],
        &format!(
            "{at}start must be a multiple of micro_batch_size·dp, but 2 % (2·2 = 4) = 2; the nearest: 4"
        ),
    );
    // Two virtual stages take no single micro-batch.
    refused(
        &["parallel.vpp=2", "train.global_batch_size=16", &ramp(4, 4, 9)],
        "[parallel] 2 virtual stages on 2 ranks cannot take 1 micro-batches",
    );
    let unknown = "train.rampup_batch_size={ start = 4, increment = 4, sample = 9 }";
    refused(&[unknown], "[train] rampup_batch_size: unknown field `sample`");
}

#[test]
fn what_is_recomputed_is_named_once_and_is_there() {
    let config = with(&["train.recompute=[\"moe_act\", \"layernorm\"]"]).unwrap();
    assert!(config.recompute().unwrap().contains(moe_model::RecomputeModule::MoeAct));
    let text = config.to_toml().unwrap();
    assert!(text.contains("recompute = [\"moe_act\", \"layernorm\"]"), "{text}");
    assert_eq!(RunConfig::parse(&text, "resolved", &[] as &[&str]).unwrap(), config);
    assert_eq!(
        refusal(&["train.recompute=[\"moe\", \"moe_act\"]"]),
        "[train] recompute \"moe_act\": it is part of \"moe\"; remove one of them"
    );
    assert_eq!(
        refusal(&["train.recompute=[\"mlp\"]"]),
        "[train] recompute \"mlp\": the model has no dense layer; remove it"
    );
    assert_eq!(
        refusal(&["train.recompute=[\"norm\"]"]),
        "[train] recompute: unknown variant `norm`, expected one of `full`, `core_attn`, `layernorm`, `mlp`, `moe`, \
         `moe_act`, `shared_experts`"
    );
}

#[test]
fn moments_in_bf16_are_kept_or_refused() {
    let both = ["optimizer.exp_avg_dtype='bf16'", "optimizer.exp_avg_sq_dtype='bf16'"];
    let config = with(&both).unwrap();
    assert!(config.optimizer.exp_avg_dtype.is_some() && config.optimizer.exp_avg_sq_dtype.is_some());
    assert_eq!(RunConfig::parse(&config.to_toml().unwrap(), "resolved", &[] as &[&str]).unwrap(), config);
    assert!(with(&[both[1], "optimizer.beta2=0.996"]).is_ok());
    assert_eq!(
        refusal(&[both[1], "optimizer.beta2=0.999"]),
        "optimizer.exp_avg_sq_dtype = \"bf16\" would never let the average fall with optimizer.beta2 = 0.999: remove it, or set \
         the decay to at most 0.996"
    );
    assert!(with(&[both[0], "optimizer.beta2=0.999"]).is_ok());
    assert!(refusal(&[both[0], "optimizer.beta1=0.999"]).contains("with optimizer.beta1 = 0.999: remove it"));
    assert_eq!(
        refusal(&[both[0], "train.dtype='f64'"]),
        "optimizer.exp_avg_dtype = \"bf16\" has no meaning with train.dtype = \"f64\": remove it, or train in f32"
    );
    assert!(refusal(&["optimizer.exp_avg_dtype='f16'"]).contains("unknown variant `f16`, expected `bf16`"));
}

#[test]
fn shared_experts_overlap_where_there_are_some() {
    let on = "parallel.moe_shared_expert_overlap=true";
    assert_eq!(
        refusal(&[on]),
        "parallel.moe_shared_expert_overlap has no meaning with a model without a shared expert: remove it, or set \
         model.n_shared_experts or model.shared_expert_intermediate_size"
    );
    let config = with(&[on, "model.n_shared_experts=1"]).unwrap();
    assert_eq!(RunConfig::parse(&config.to_toml().unwrap(), "resolved", &[] as &[&str]).unwrap(), config);
}

#[test]
fn instances_of_the_optimizer_divide_the_replicas() {
    let instances = |n: usize| format!("parallel.num_distributed_optimizer_instances={n}");
    let folding = |overrides: &[&str]| with(overrides).unwrap().folding().unwrap();
    // DP 4 and EDP 2, of 16 ranks.
    let replicas = ["parallel.world_size=16", "train.global_batch_size=16", &instances(2)];
    let two = folding(&replicas);
    assert_eq!((two.size(Attention::DP_OUTER), two.size(Expert::EDP_OUTER)), (2, 2));
    assert_eq!(folding(&replicas[..2]).size(Attention::DP_OUTER), 1);
    for n in [0, 3, 4] {
        assert_eq!(
            refusal(&[replicas[0], replicas[1], &instances(n)]),
            format!(
                "parallel.num_distributed_optimizer_instances = {n}, but it must be a common divisor of dp = 4 and edp = 2: 1, 2"
            )
        );
    }
    // CP 2 would do as well, but not for the length of these sequences.
    let order = ["parallel.order=tp-dp-cp-ep-pp", "parallel.ep=2", "train.sequence_length=6"];
    let refused = refusal(&[&replicas[..], &order].concat());
    assert!(refused.contains("the optimizer instances of both views must be the same"), "{refused}");
    assert!(refused.contains("(order tp-dp-cp-ep-pp -> tp-cp-ep-dp-pp)"), "{refused}");
    assert!(!refused.contains("cp 1 -> 2"), "{refused}");
}

#[test]
fn prompts_with_completions_are_separated() {
    let format = "data.format=prompt-completion";
    for (overrides, separates) in [
        (&[][..], false),
        (&["data.separate_documents=true"], true),
        (&[format], true),
        (&[format, "data.separate_documents=true"], true),
    ] {
        let config = with(overrides).unwrap();
        assert_eq!(config.data.separate_documents, Some(separates), "{overrides:?}");
        let text = config.to_toml().unwrap();
        assert_eq!(RunConfig::parse(&text, "resolved", &[] as &[&str]).unwrap(), config);
    }
    assert_eq!(
        refusal(&[format, "data.separate_documents=false"]),
        "data.separate_documents cannot be false with data.format = \"prompt-completion\": samples that share a sequence must \
         not see each other; remove it"
    );
    assert!(refusal(&["data.format=chat"]).starts_with("[data] format: unknown variant `chat`"));
}

const BLEND: &str = "data.blend=[{path = 'web', weight = 3}, {path = 'code.tokens'}]";

#[test]
fn a_blend_stands_in_place_of_files() {
    let config =
        with(&["data.files=[]", BLEND, "data.validation=['held']", "train.eval_interval=5"]).unwrap();
    assert_eq!(config.data.weights(), [3.0, 1.0]);
    assert_eq!((config.data.held_out, config.data.separate_documents), (None, Some(false)));
    let text = config.to_toml().unwrap();
    assert!(text.contains("[[data.blend]]\npath = \"code.tokens\"\nweight = 1.0\n"), "{text}");
    assert_eq!(RunConfig::parse(&text, "resolved", &[] as &[&str]).unwrap(), config);
    with(&["data.files=[]", BLEND, "data.held_out=0.1", "train.eval_interval=5"]).unwrap();
    // Tokens of a blend may be of any tokenizer.
    with(&["data.files=[]", BLEND, "model.vocab_size=65"]).unwrap();
    assert_eq!(with(&[]).unwrap().data.held_out, Some(0.05));
}

#[test]
fn a_blend_without_meaning_is_refused() {
    let refused = |more: &[&str]| refusal(&[&["data.files=[]", BLEND], more].concat());
    for (overrides, message) in [
        (
            &["data.files=['a']"][..],
            "data.files cannot stand with [[data.blend]]: text is tokenised into the folder",
        ),
        (&["data.held_out=1.5"], "data.held_out = 1.5, but it must be above 0 and below 1"),
        (
            &["data.held_out=0.1", "data.validation=['held']"],
            "data.held_out cannot stand with data.validation: ",
        ),
        (
            &["train.eval_interval=5"],
            "train.eval_interval has no meaning with [[data.blend]] alone: say what to evaluate on with data.held_out or data.validation, or remove it",
        ),
        (&["data.blend=[]"], "data.files = [], but it must be a list of at least one pattern, unless"),
        (
            &["data.blend=[]", "data.files=['a']", "data.validation=['held']"],
            "data.validation has no meaning with data.files: ",
        ),
        (
            &["data.blend=[{path = 'a', weight = 0}]"],
            "[[data.blend]] weight 1 is 0, but it must be finite and above 0",
        ),
        (&["data.blend=[{path = 'a'}, {path = 'b', weight = -1}]"], "[[data.blend]] weight 2 is -1, but"),
        (
            &["data.blend=[{path = 'a'}, {path = 'b', weight = 1e-6}]"],
            "[[data.blend]] weight 2 is 0.000001, which of 1.000001 in all is not",
        ),
        (&["data.blend=[{weight = 1}]"], "[data] blend: missing field `path`"),
        (
            &["data.blend=[{path = 'a', wieght = 1}]"],
            "[data] blend: unknown field `wieght`, expected `path` or `weight`",
        ),
    ] {
        let error = refused(overrides);
        assert!(error.starts_with(message), "{error}");
    }
}
