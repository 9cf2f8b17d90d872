//! The table: what can be combined, and what cannot. A new feature is a line of [`FACTORS`], and a line of [`RULES`] for each
//! reason why it does not go with another.

/// A choice that a case makes.
pub struct Factor {
    pub name: &'static str,
    pub levels: &'static [Level],
}

/// A name, and the settings of a run's configuration. The first level of a factor is the plain one.
pub struct Level(pub &'static str, pub &'static [&'static str]);

/// Sizes of all cases; `num_local_experts`, widths and heads are such that all sizes of axes below divide them.
pub const BASE: &str = r#"
    [model]
    vocab_size = 257
    hidden_size = 24
    intermediate_size = 18
    moe_intermediate_size = 12
    num_attention_heads = 12
    num_local_experts = 12
    num_experts_per_tok = 2
    rope_theta = 100.0
    initializer_range = 0.2

    [train]
    steps = 2
    dtype = "f64"
    seed = 5
    output = "none"

    [optimizer]
    lr = 0.01
    min_lr = 0.001
    warmup_steps = 1
    decay_steps = 10

    [data]
    files = ["none"]
"#;

const NONE: &[&str] = &[];

pub const FACTORS: &[Factor] = &[
    // Foldings. What is not the model's or the batch's is no part of the reference run: see `is_mapping`.
    Factor {
        name: "tp",
        levels: &[
            Level("1", NONE),
            Level("2", &["parallel.tp=2"]),
            Level("3", &["parallel.tp=3"]),
            Level("6", &["parallel.tp=6"]),
        ],
    },
    Factor {
        name: "cp",
        levels: &[
            Level("1", NONE),
            Level("2 ring", &["parallel.cp=2"]),
            Level("3 ring", &["parallel.cp=3"]),
            Level("2 ulysses", &["parallel.cp=2", "parallel.cp_ulysses=2"]),
            Level("3 ulysses", &["parallel.cp=3", "parallel.cp_ulysses=3"]),
            Level("4 ring of 2 ulysses", &["parallel.cp=4", "parallel.cp_ulysses=2"]),
        ],
    },
    Factor { name: "dp", levels: &[Level("1", NONE), Level("2", NONE), Level("3", NONE)] },
    Factor {
        name: "pp",
        levels: &[Level("1", NONE), Level("2", &["parallel.pp=2"]), Level("3", &["parallel.pp=3"])],
    },
    Factor { name: "vpp", levels: &[Level("1", NONE), Level("2", &["parallel.vpp=2"])] },
    Factor {
        name: "schedule",
        levels: &[
            Level("1f1b", NONE),
            Level("overlapped-1f1b", &["parallel.schedule=overlapped-1f1b"]),
            Level("gpipe", &["parallel.schedule=gpipe"]),
            Level("breadth-first", &["parallel.schedule=breadth-first"]),
            Level("zb-h1", &["parallel.schedule=zb-h1"]),
            Level("interleaved-zero-bubble", &["parallel.schedule=interleaved-zero-bubble"]),
            Level("zb-h2", &["parallel.schedule=zb-h2"]),
            Level("zb-v", &["parallel.schedule=zb-v"]),
            Level("v-half", &["parallel.schedule=v-half"]),
            Level("v-min", &["parallel.schedule=v-min"]),
            Level("dual-pipe-v", &["parallel.schedule=dual-pipe-v"]),
        ],
    },
    Factor {
        name: "ep",
        levels: &[
            Level("1", NONE),
            Level("2", &["parallel.ep=2"]),
            Level("3", &["parallel.ep=3"]),
            Level("4", &["parallel.ep=4"]),
        ],
    },
    Factor {
        name: "etp",
        levels: &[Level("1", NONE), Level("2", &["parallel.etp=2"]), Level("3", &["parallel.etp=3"])],
    },
    Factor {
        name: "order",
        levels: &[
            Level("pp last", NONE),
            Level("dp last", &["parallel.order=tp-cp-ep-pp-dp"]),
            Level("cp first", &["parallel.order=cp-tp-dp-ep-pp"]),
        ],
    },
    Factor {
        name: "dispatcher",
        levels: &[Level("all-to-all", NONE), Level("all-gather", &["parallel.dispatcher=all-gather"])],
    },
    // So many layers as stages need, and where they are: see `Case`.
    Factor {
        name: "layers",
        levels: &[Level("even", NONE), Level("listed", NONE), Level("in notation", NONE)],
    },
    Factor { name: "micro-batch group", levels: &[Level("pp", NONE), Level("all", NONE)] },
    Factor {
        name: "optimizer instances",
        levels: &[
            Level("1", NONE),
            Level("2", &["parallel.num_distributed_optimizer_instances=2"]),
            Level("3", &["parallel.num_distributed_optimizer_instances=3"]),
        ],
    },
    Factor {
        name: "shared overlap",
        levels: &[Level("no", NONE), Level("yes", &["parallel.moe_shared_expert_overlap=true"])],
    },
    Factor {
        name: "overlap",
        levels: &[
            Level("both", NONE),
            Level("none", &["train.overlap_grad_reduce=false", "train.overlap_param_gather=false"]),
            Level("gradients", &["train.overlap_param_gather=false"]),
            Level("weights", &["train.overlap_grad_reduce=false"]),
        ],
    },
    Factor {
        name: "recompute",
        levels: &[
            Level("none", NONE),
            Level("full", &["train.recompute=[\"full\"]"]),
            Level("operations", &["train.recompute=[\"core_attn\", \"layernorm\", \"moe_act\"]"]),
            Level("experts", &["train.recompute=[\"moe\", \"core_attn\"]"]),
            Level("dense layers", &["train.recompute=[\"mlp\", \"layernorm\"]"]),
            Level("shared experts", &["train.recompute=[\"shared_experts\", \"moe_act\"]"]),
        ],
    },
    // The batch.
    Factor {
        name: "sequence",
        levels: &[Level("24", &["train.sequence_length=24"]), Level("36", &["train.sequence_length=36"])],
    },
    Factor {
        name: "micro-batch",
        levels: &[Level("1", &["train.micro_batch_size=1"]), Level("2", &["train.micro_batch_size=2"])],
    },
    Factor {
        name: "ramp-up",
        levels: &[
            Level("none", &["train.global_batch_size=12"]),
            Level(
                "12 to 24",
                &[
                    "train.global_batch_size=24",
                    "train.rampup_batch_size={start = 12, increment = 12, samples = 12}",
                ],
            ),
        ],
    },
    Factor {
        name: "documents",
        levels: &[Level("as one", NONE), Level("separated", &["data.separate_documents=true"])],
    },
    // Sequences that end in padding: of the source, which all settings of a run's configuration are silent about.
    Factor { name: "padding", levels: &[Level("none", NONE), Level("some", &["source.padding=true"])] },
    // Attention.
    Factor {
        name: "kv heads",
        levels: &[
            Level("6", &["model.num_key_value_heads=6"]),
            Level("12", &["model.num_key_value_heads=12"]),
            Level("2", &["model.num_key_value_heads=2"]),
        ],
    },
    Factor {
        name: "attention",
        levels: &[
            Level("grouped-query", &["model.head_dim=4"]),
            Level(
                "latent",
                &[
                    "model.kv_lora_rank=14",
                    "model.q_lora_rank=10",
                    "model.qk_nope_head_dim=3",
                    "model.qk_rope_head_dim=4",
                    "model.v_head_dim=5",
                ],
            ),
            Level(
                "latent, queries direct",
                &[
                    "model.kv_lora_rank=14",
                    "model.qk_nope_head_dim=3",
                    "model.qk_rope_head_dim=4",
                    "model.v_head_dim=5",
                ],
            ),
        ],
    },
    Factor {
        name: "rotary pairs",
        levels: &[
            Level("the model's", NONE),
            Level("halves", &["model.rope_interleave=false"]),
            Level("adjacent", &["model.rope_interleave=true"]),
        ],
    },
    Factor {
        name: "rope scaling",
        levels: &[
            Level("none", NONE),
            Level("linear", &["model.rope_scaling={rope_type = \"linear\", factor = 2.5}"]),
            Level(
                "yarn",
                &[
                    "model.rope_scaling={rope_type = \"yarn\", factor = 4.0, original_max_position_embeddings = 8, \
                     beta_fast = 1.0, beta_slow = 0.05, mscale = 0.707, mscale_all_dim = 0.9}",
                ],
            ),
        ],
    },
    Factor {
        name: "qk-norm",
        levels: &[
            Level("no", NONE),
            Level("of heads", &["model.use_qk_norm=true"]),
            Level("of projections", &["model.use_qk_norm=true", "model.qk_norm_scope=projection"]),
        ],
    },
    Factor {
        name: "attention bias",
        levels: &[Level("no", NONE), Level("yes", &["model.attention_bias=true"])],
    },
    Factor { name: "window", levels: &[Level("none", NONE), Level("7", &["model.sliding_window=7"])] },
    Factor {
        name: "tied embeddings",
        levels: &[Level("no", NONE), Level("yes", &["model.tie_word_embeddings=true"])],
    },
    Factor { name: "padding token", levels: &[Level("none", NONE), Level("5", &["model.pad_token_id=5"])] },
    // Feed-forward layers.
    Factor {
        name: "pattern",
        levels: &[
            Level("all experts", NONE),
            Level("second dense", &["model.mlp_only_layers=[1]"]),
            Level("every second", &["model.decoder_sparse_step=2"]),
            Level("first dense", &["model.first_k_dense_replace=1"]),
        ],
    },
    Factor {
        name: "shared expert",
        levels: &[
            Level("none", NONE),
            Level("gated", &["model.shared_expert_intermediate_size=18"]),
            Level("plain", &["model.n_shared_experts=2"]),
        ],
    },
    Factor {
        name: "activation",
        levels: &[Level("silu", NONE), Level("gelu", &["model.hidden_act=gelu_pytorch_tanh"])],
    },
    Factor {
        name: "biases",
        levels: &[
            Level("none", NONE),
            Level("experts", &["model.expert_mlp_bias=true"]),
            Level("dense, shared", &["model.mlp_bias=true"]),
        ],
    },
    // The router.
    Factor {
        name: "scores",
        levels: &[
            Level("softmax-post", NONE),
            Level("softmax", &["model.scoring_func=softmax"]),
            Level("softmax, as it is", &["model.scoring_func=softmax", "model.norm_topk_prob=false"]),
            Level("sigmoid", &["model.scoring_func=sigmoid"]),
            Level("sigmoid, as it is", &["model.scoring_func=sigmoid", "model.norm_topk_prob=false"]),
            Level("sqrtsoftplus", &["model.scoring_func=sqrtsoftplus"]),
        ],
    },
    Factor {
        name: "expert groups",
        levels: &[
            Level("none", NONE),
            Level("2 of 4", &["model.n_group=4", "model.topk_group=2"]),
            Level(
                "1 of 2 by the best",
                &["model.n_group=2", "model.topk_group=1", "model.group_score_topk=1"],
            ),
        ],
    },
    Factor {
        name: "scaling",
        levels: &[Level("1", NONE), Level("2.5", &["model.routed_scaling_factor=2.5"])],
    },
    Factor {
        name: "balance",
        levels: &[
            Level("micro-batch", &["model.router_aux_loss_coef=0.03"]),
            Level("none", &["model.router_aux_loss_coef=0.0"]),
            Level("sequence", &["model.router_aux_losses=[{scope = \"sequence\", coef = 0.05}]"]),
            Level("global", &["model.router_aux_losses=[{scope = \"global\", coef = 0.07}]"]),
            Level("model", &["model.router_aux_losses=[{scope = \"model\", coef = 0.06}]"]),
            Level(
                "three scopes",
                &[
                    "model.router_aux_losses=[{scope = \"global\", coef = 0.02}, {scope = \"sequence\", coef = 0.03}, \
                     {scope = \"micro_batch\", coef = 0.04}]",
                ],
            ),
        ],
    },
    Factor {
        name: "z-loss",
        levels: &[Level("0.01", &["model.router_z_loss_coef=0.01"]), Level("none", NONE)],
    },
    Factor {
        name: "router type",
        levels: &[Level("the model's", NONE), Level("f64", &["model.moe_router_dtype=f64"])],
    },
    Factor {
        name: "jitter",
        levels: &[Level("none", NONE), Level("0.1", &["model.router_jitter_noise=0.1"])],
    },
    Factor {
        name: "sinkhorn",
        levels: &[Level("none", NONE), Level("6 times", &["model.moe_router_sinkhorn_iterations=6"])],
    },
    Factor {
        name: "forced routing",
        levels: &[
            Level("none", NONE),
            Level("balanced", &["train.moe_router_force_load_balancing=true"]),
            Level("skewed", &["train.moe_router_force_skew=1.5"]),
        ],
    },
    Factor {
        name: "expert bias",
        levels: &[
            Level("none", NONE),
            Level(
                "moves",
                &["model.moe_router_enable_expert_bias=true", "optimizer.moe_router_bias_update_rate=0.02"],
            ),
        ],
    },
    Factor {
        name: "capacity",
        levels: &[
            Level("none", NONE),
            Level("by weight", &["train.moe_expert_capacity_factor=1.0"]),
            Level(
                "by position",
                &["train.moe_expert_capacity_factor=0.7", "train.moe_token_drop_policy=position"],
            ),
            Level(
                "by weight, per rank",
                &["train.moe_expert_capacity_factor=0.9", "train.moe_token_drop_scope=sub"],
            ),
            Level(
                "by position, per rank",
                &[
                    "train.moe_expert_capacity_factor=1.2",
                    "train.moe_token_drop_policy=position",
                    "train.moe_token_drop_scope=sub",
                ],
            ),
        ],
    },
    Factor {
        name: "rows of experts",
        levels: &[
            Level("exact", NONE),
            Level("padded", &["train.moe_pad_expert_input_to_capacity=true"]),
            Level("budget", &["train.moe_expert_rank_capacity_factor=1.25"]),
        ],
    },
    // The optimizer.
    Factor {
        name: "parameter groups",
        levels: &[
            Level("one", NONE),
            Level(
                "frozen and scaled",
                &["optimizer.groups=[{match = \"model.layers.0.self_attn.o_proj.weight\", frozen = true}, \
                     {match = \"*.experts.[05].w1.weight\", frozen = true}, \
                     {match = \"*norm*\", lr_scale = 0.5}, \
                     {match = \"*.self_attn.*_proj*.weight\", weight_decay = 0.4}]"],
            ),
        ],
    },
];

/// Whether a setting says how, not what is computed.
pub fn is_mapping(setting: &str) -> bool {
    let starts = [
        "parallel.",
        "train.overlap_",
        "train.recompute=",
        "train.moe_pad_expert_input_to_capacity=",
        "train.moe_expert_rank_capacity_factor=",
    ];
    starts.iter().any(|start| setting.starts_with(start))
}

/// What a rule looks at: levels by the names of their factors.
pub struct Choice<'a>(pub &'a [usize]);

impl Choice<'_> {
    fn level(&self, factor: &str) -> &'static str {
        let factor = factor_named(factor);
        FACTORS[factor].levels[self.0[factor]].0
    }

    fn is(&self, factor: &str, level: &str) -> bool {
        self.level(factor) == level
    }

    fn starts(&self, factor: &str, start: &str) -> bool {
        self.level(factor).starts_with(start)
    }

    /// The number that a level starts with.
    pub fn number(&self, factor: &str) -> usize {
        let level = self.level(factor);
        level.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{level}"))
    }

    /// Ranks of CP that exchange heads.
    fn ulysses(&self) -> usize {
        match self.level("cp") {
            level if level.ends_with("of 2 ulysses") => 2,
            level if level.ends_with("ulysses") => self.number("cp"),
            _ => 1,
        }
    }

    pub fn world(&self) -> usize {
        ["tp", "cp", "dp", "pp"].map(|axis| self.number(axis)).iter().product()
    }

    /// Whether virtual stages take micro-batches in groups.
    fn has_groups(&self) -> bool {
        let schedules = ["1f1b", "overlapped-1f1b", "interleaved-zero-bubble"];
        self.number("vpp") > 1 && schedules.contains(&self.level("schedule"))
    }

    pub fn stages(&self) -> usize {
        self.number("pp") * self.number("vpp")
    }

    /// Micro-batches of a data-parallel rank in the first step.
    pub fn micro_batches(&self) -> usize {
        12 / (self.number("micro-batch") * self.number("dp"))
    }
}

pub fn factor_named(name: &str) -> usize {
    FACTORS.iter().position(|factor| factor.name == name).unwrap_or_else(|| panic!("no factor {name}"))
}

/// Why some choices cannot be made together.
pub struct Rule {
    pub why: &'static str,
    /// What the refusal of a configuration says, one of these; none where it is this list's own limit.
    pub refusals: &'static [&'static str],
    pub factors: &'static [&'static str],
    pub holds: fn(&Choice<'_>) -> bool,
}

pub const RULES: &[Rule] = &[
    Rule {
        why: "rows are padded to a capacity",
        refusals: &["moe_pad_expert_input_to_capacity has no meaning"],
        factors: &["capacity", "rows of experts"],
        holds: |c| !c.is("rows of experts", "padded") || !c.is("capacity", "none"),
    },
    Rule {
        why: "threads of this test's world",
        refusals: &[],
        factors: &["tp", "cp", "dp", "pp"],
        holds: |c| c.world() <= 36,
    },
    Rule {
        why: "etp·ep divides tp·cp·dp",
        refusals: &["must be a multiple of"],
        factors: &["tp", "cp", "dp", "ep", "etp"],
        holds: |c| {
            (c.number("tp") * c.number("cp") * c.number("dp")) % (c.number("etp") * c.number("ep")) == 0
        },
    },
    Rule {
        why: "with dp beyond pp, stages of both views are the same ranks only if tp·cp = etp·ep",
        refusals: &["pp"],
        factors: &["tp", "cp", "pp", "ep", "etp", "order"],
        holds: |c| {
            let inner = c.number("tp") * c.number("cp");
            !c.is("order", "dp last") || c.number("pp") == 1 || inner == c.number("etp") * c.number("ep")
        },
    },
    Rule {
        why: "tp·cp_ulysses divides 12 heads",
        refusals: &["num_attention_heads must be a multiple"],
        factors: &["tp", "cp"],
        holds: |c| 12 % (c.number("tp") * c.ulysses()) == 0,
    },
    Rule {
        why: "tp, and tp·cp_ulysses, divides the key-value heads or is a multiple of them",
        refusals: &["num_key_value_heads"],
        factors: &["tp", "cp", "kv heads"],
        holds: |c| {
            let fits = |ranks: usize| {
                let heads = c.number("kv heads");
                heads.is_multiple_of(ranks) || ranks.is_multiple_of(heads)
            };
            fits(c.number("tp")) && fits(c.number("tp") * c.ulysses())
        },
    },
    Rule {
        why: "a sequence is two chunks for each rank of cp",
        refusals: &["sequence_length must be a multiple", "equal chunks"],
        factors: &["cp", "sequence"],
        holds: |c| c.number("cp") == 1 || c.number("sequence") % (2 * c.number("cp")) == 0,
    },
    Rule {
        why: "tp divides a rank's positions",
        refusals: &["sequence_length must be a multiple", "cannot be cut into drop units"],
        factors: &["tp", "cp", "sequence"],
        holds: |c| c.number("sequence") % (c.number("cp") * c.number("tp")) == 0,
    },
    Rule {
        why: "virtual stages are for several pipeline ranks",
        refusals: &["vpp"],
        factors: &["pp", "vpp"],
        holds: |c| c.number("pp") > 1 || c.number("vpp") == 1,
    },
    Rule {
        why: "some schedules are for one stage per rank",
        refusals: &["parallel.vpp = 2, but it must be 1 with parallel.schedule"],
        factors: &["vpp", "schedule"],
        holds: |c| c.number("vpp") == 1 || !["gpipe", "zb-h1", "zb-h2"].contains(&c.level("schedule")),
    },
    Rule {
        why: "some schedules are for two stages per rank, in a V",
        refusals: &["parallel.vpp = 1, but it must be 2 with parallel.schedule"],
        factors: &["pp", "vpp", "schedule"],
        holds: |c| {
            let two = c.number("vpp") == 2 && c.number("pp") > 1;
            two || !["zb-v", "v-half", "v-min", "dual-pipe-v"].contains(&c.level("schedule"))
        },
    },
    Rule {
        why: "DualPipeV is for two micro-batches per rank at least",
        refusals: &["DualPipeV on"],
        factors: &["dp", "pp", "schedule", "micro-batch"],
        holds: |c| !c.is("schedule", "dual-pipe-v") || c.micro_batches() >= 2 * c.number("pp"),
    },
    Rule {
        why: "groups of micro-batches are for virtual stages, in schedules that know them",
        refusals: &["parallel.micro_batch_group_size"],
        factors: &["pp", "vpp", "schedule", "micro-batch group"],
        holds: |c| c.is("micro-batch group", "pp") || (c.has_groups() && c.number("pp") > 1),
    },
    Rule {
        why: "interleaved stages take groups of at least pp micro-batches, the last one too",
        refusals: &["micro-batches"],
        factors: &["dp", "pp", "vpp", "schedule", "micro-batch", "micro-batch group"],
        holds: |c| {
            let (pp, m) = (c.number("pp"), c.micro_batches());
            let group = if c.is("micro-batch group", "all") { m } else { pp };
            !c.has_groups() || (pp <= group && group <= m && (m % group == 0 || m % group >= pp))
        },
    },
    Rule {
        why: "a sliding window does not go round a ring",
        refusals: &["sliding_window"],
        factors: &["cp", "window"],
        holds: |c| c.is("window", "none") || c.ulysses() == c.number("cp"),
    },
    Rule {
        why: "latent attention has keys and values for each head",
        refusals: &["num_key_value_heads"],
        factors: &["kv heads", "attention"],
        holds: |c| !c.starts("attention", "latent") || c.is("kv heads", "12"),
    },
    Rule {
        why: "latent attention has norms of its own",
        refusals: &["use_qk_norm"],
        factors: &["attention", "qk-norm"],
        holds: |c| !c.starts("attention", "latent") || c.is("qk-norm", "no"),
    },
    Rule {
        why: "a bias balances scores that do not depend on each other",
        refusals: &["moe_router_enable_expert_bias"],
        factors: &["scores", "expert bias"],
        holds: |c| c.is("expert bias", "none") || !c.starts("scores", "softmax"),
    },
    Rule {
        why: "what is recomputed is part of the model: dense layers",
        refusals: &["the model has no dense layer"],
        factors: &["pattern", "recompute"],
        holds: |c| !c.is("recompute", "dense layers") || !c.is("pattern", "all experts"),
    },
    Rule {
        why: "what is recomputed is part of the model: shared experts",
        refusals: &["the model has no shared expert"],
        factors: &["shared expert", "recompute"],
        holds: |c| !c.is("recompute", "shared experts") || !c.is("shared expert", "none"),
    },
    Rule {
        why: "instances of the optimizer divide dp and edp",
        refusals: &["num_distributed_optimizer_instances"],
        factors: &["tp", "cp", "dp", "ep", "etp", "optimizer instances"],
        holds: |c| {
            let (dp, instances) = (c.number("dp"), c.number("optimizer instances"));
            let edp = c.number("tp") * c.number("cp") * dp / (c.number("etp") * c.number("ep"));
            dp % instances == 0 && edp % instances == 0
        },
    },
    Rule {
        why: "with ep beyond dp, optimizer instances of both views are the same ranks only if ep is 1",
        refusals: &["optimizer instances of both views"],
        factors: &["ep", "order", "optimizer instances"],
        holds: |c| !c.is("order", "cp first") || c.number("optimizer instances") == 1 || c.number("ep") == 1,
    },
    Rule {
        why: "what overlaps is a shared expert",
        refusals: &["moe_shared_expert_overlap"],
        factors: &["shared expert", "shared overlap"],
        holds: |c| c.is("shared overlap", "no") || !c.is("shared expert", "none"),
    },
    Rule {
        why: "a bias would follow forced choices",
        refusals: &["moe_router_force"],
        factors: &["expert bias", "forced routing"],
        holds: |c| c.is("expert bias", "none") || c.is("forced routing", "none"),
    },
    Rule {
        why: "forced choices keep to no groups",
        refusals: &["moe_router_force"],
        factors: &["expert groups", "forced routing"],
        holds: |c| c.is("expert groups", "none") || c.is("forced routing", "none"),
    },
    Rule {
        why: "Sinkhorn's choice is balanced by itself",
        refusals: &["moe_router_sinkhorn_iterations with a load-balancing loss"],
        factors: &["balance", "sinkhorn"],
        holds: |c| c.is("sinkhorn", "none") || c.is("balance", "none"),
    },
    Rule {
        why: "Sinkhorn chooses by other scores than a bias is added to",
        refusals: &["moe_router_sinkhorn_iterations with moe_router_enable_expert_bias"],
        factors: &["sinkhorn", "expert bias"],
        holds: |c| c.is("sinkhorn", "none") || c.is("expert bias", "none"),
    },
    Rule {
        why: "Sinkhorn spreads tokens over all experts",
        refusals: &["moe_router_sinkhorn_iterations with n_group above 1"],
        factors: &["expert groups", "sinkhorn"],
        holds: |c| c.is("sinkhorn", "none") || c.is("expert groups", "none"),
    },
    Rule {
        why: "experts are chosen by Sinkhorn or forced",
        refusals: &["moe_router_force_load_balancing contradicts", "moe_router_force_skew contradicts"],
        factors: &["sinkhorn", "forced routing"],
        holds: |c| c.is("sinkhorn", "none") || c.is("forced routing", "none"),
    },
];

/// Foldings of 24 and 36 ranks with three-way axes: parts of cases that the list must have.
pub const LARGE: &[&[(&str, &str)]] = &[
    &[("tp", "3"), ("cp", "2 ring"), ("dp", "2"), ("pp", "2"), ("ep", "4"), ("etp", "3")],
    &[("tp", "2"), ("cp", "3 ring"), ("dp", "2"), ("pp", "2"), ("ep", "3"), ("etp", "2")],
    &[("tp", "6"), ("cp", "4 ring of 2 ulysses"), ("pp", "1"), ("ep", "4"), ("etp", "3"), ("dp", "1")],
    &[("tp", "2"), ("cp", "2 ulysses"), ("dp", "2"), ("pp", "3"), ("ep", "4"), ("etp", "2")],
    &[("tp", "2"), ("cp", "2 ring"), ("dp", "2"), ("pp", "3"), ("vpp", "2"), ("ep", "2")],
    &[("tp", "3"), ("cp", "4 ring of 2 ulysses"), ("dp", "2"), ("pp", "1"), ("ep", "4"), ("etp", "2")],
    &[("tp", "3"), ("cp", "2 ulysses"), ("dp", "3"), ("pp", "2"), ("ep", "3"), ("etp", "3")],
    &[("tp", "2"), ("cp", "2 ring"), ("dp", "3"), ("pp", "3"), ("ep", "4"), ("etp", "3")],
    &[("tp", "2"), ("cp", "3 ulysses"), ("dp", "3"), ("pp", "2"), ("vpp", "2"), ("ep", "3")],
    &[("tp", "6"), ("cp", "2 ulysses"), ("dp", "3"), ("pp", "1"), ("ep", "4"), ("etp", "3")],
    &[("tp", "3"), ("cp", "3 ring"), ("dp", "2"), ("pp", "2"), ("ep", "2"), ("etp", "3")],
    &[("tp", "3"), ("cp", "1"), ("dp", "3"), ("pp", "3"), ("ep", "3"), ("etp", "1")],
];
