//! The command itself, in folders of its own: what it writes, what it refuses, and with which status.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// A folder with some text and the configuration of a small run.
struct Place(tempfile::TempDir);

/// What a command that has ended said.
#[derive(Debug)]
struct Said {
    status: i32,
    out: String,
    err: String,
}

impl Said {
    fn new(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let (out, err) = (text(output.stdout), text(output.stderr));
        assert!(!err.contains("panicked"), "{err}");
        Said { status: output.status.code().expect("ended by a signal"), out, err }
    }

    #[track_caller]
    fn ok(self) -> Self {
        assert_eq!(self.status, 0, "{self:?}");
        self
    }

    /// Ended with `status` and one message that has all of `parts`.
    #[track_caller]
    fn refused(self, status: i32, parts: &[&str]) -> Self {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.err.matches("error: ").count(), 1, "{self:?}");
        let message = self.err.split("error: ").last().unwrap();
        for part in parts {
            assert!(message.contains(part), "\"{part}\" is not in: {message}");
        }
        self
    }
}

impl Place {
    /// TP2 × PP2 with EP2, six steps, checkpoints of steps 4 and 6, evaluations after steps 3 and 6.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = "
            [model]
            vocab_size = 256
            hidden_size = 16
            intermediate_size = 8
            num_hidden_layers = 2
            num_attention_heads = 4
            num_key_value_heads = 2
            num_local_experts = 4
            num_experts_per_tok = 2
            router_aux_loss_coef = 0.01

            [parallel]
            world_size = 4
            tp = 2
            pp = 2
            ep = 2

            [train]
            dtype = 'f64'
            steps = 6
            global_batch_size = 4
            micro_batch_size = 2
            sequence_length = 32
            output = 'run'
            eval_interval = 3
            save_interval = 2
            deadline_seconds = 20
            peak_tflops = 0.5

            [optimizer]
            lr = 1e-2
            min_lr = 1e-3
            warmup_steps = 2
            decay_steps = 20

            [data]
            files = ['text/*.txt']
            held_out = 0.3

            [sample]
            tokens = 8
        ";
        fs::write(folder.path().join("run.toml"), config).unwrap();
        fs::create_dir(folder.path().join("text")).unwrap();
        for n in 0..7u32 {
            let words =
                (0..200 + 31 * n).map(|i| ["a", "rank", "of", "folded", "experts"][(i * i + n) as usize % 5]);
            let text = words.collect::<Vec<_>>().join(" ");
            fs::write(folder.path().join(format!("text/{n}.txt")), text).unwrap();
        }
        Place(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moe-train"));
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Said {
        Said::new(self.command(arguments).output().unwrap())
    }

    /// `train run.toml` and more.
    fn train(&self, arguments: &[&str]) -> Said {
        self.run(&[&["train", "run.toml"], arguments].concat())
    }

    /// The lines of a run's metrics.
    fn metrics(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The lines without what depends on the clock.
    fn timeless(&self, run: &str) -> Vec<Value> {
        let mut lines = self.metrics(run);
        for line in &mut lines {
            for key in ["tokens_per_second", "tflops_per_rank", "mfu"] {
                line.as_object_mut().unwrap().remove(key);
            }
        }
        lines
    }

    /// All files below the folder, by their hash.
    fn hashes(&self) -> BTreeMap<PathBuf, String> {
        fn below(folder: &Path, found: &mut BTreeMap<PathBuf, String>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => below(&path, found),
                    false => {
                        let hash = blake3::hash(&fs::read(&path).unwrap());
                        found.insert(path, hash.to_string());
                    }
                }
            }
        }
        let mut found = BTreeMap::new();
        below(self.0.path(), &mut found);
        found
    }
}

/// Flips one bit near the start of a file.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    bytes[3] ^= 4;
    fs::write(path, bytes).unwrap();
}

fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 5]).unwrap();
}

/// Before anything is written, by one rank and by the one that would start several: without the feature the message says how to build,
/// with it which library is missing.
#[test]
fn a_gpu_that_cannot_be_used_is_refused_by_name() {
    let place = Place::new();
    let gpu = ["--set", "train.device=cuda"];
    let alone = ["parallel.world_size=1", "parallel.tp=1", "parallel.pp=1", "parallel.ep=1"];
    let (status, parts) = match cfg!(feature = "cuda") {
        true => (5, ["libcuda", "LD_LIBRARY_PATH"]),
        false => (2, ["train.device = \"cuda\"", "--features cuda"]),
    };
    for folding in [&alone[..], &[]] {
        let mut command = place.command(&["train", "run.toml"]);
        command.args(gpu).args(folding.iter().flat_map(|setting| ["--set", setting]));
        let said = Said::new(command.env("CUDA_VISIBLE_DEVICES", "").output().unwrap());
        if said.err.contains("libcuda") || !cfg!(feature = "cuda") {
            said.refused(status, &parts);
        } else {
            // There is a driver, which shows no GPU.
            assert_ne!(said.status, 0, "{said:?}");
        }
        assert!(!place.path("run").exists());
    }
}

/// Before a device is looked for.
#[test]
#[cfg(feature = "cuda")]
fn processes_that_are_not_the_ranks_of_the_run_are_refused() {
    let place = Place::new();
    let with = |variables: [(&str, &str); 3]| {
        let mut command = place.command(&["train", "run.toml", "--set", "train.device=cuda"]);
        Said::new(command.envs(variables).output().unwrap())
    };
    let [rank, four, local] = [("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")];
    with([rank, ("WORLD_SIZE", "8"), local]).refused(2, &["WORLD_SIZE is 8 and parallel.world_size is 4"]);
    with([rank, four, ("MASTER_PORT", "1")]).refused(2, &["RANK is set and LOCAL_RANK is not"]);
    with([rank, four, local]).refused(2, &["RANK is set and MASTER_ADDR is not"]);
    with([("RANK", "four"), four, local]).refused(2, &["RANK is \"four\""]);
    assert!(!place.path("run").exists());
}

/// Four processes, which share GPUs where there are fewer: the numbers of threads on the host, checkpoints that either goes on from, and
/// what goes wrong said once.
#[test]
#[cfg(feature = "cuda")]
fn ranks_on_gpus_do_what_threads_do() {
    if !matches!(moe_kernels::cuda::probe(), Ok(1..)) {
        assert!(std::env::var_os("MOE_REQUIRE_GPU").is_none(), "no CUDA device");
        eprintln!("skipped: no CUDA device");
        return;
    }
    let place = Place::new();
    let on_gpus = |arguments: &[&str]| {
        let mut command = place.command(arguments);
        Said::new(command.env("MOE_SHARE_GPUS", "1").output().unwrap())
    };
    let gpus = |more: &[&str]| {
        // Kernels may have to be compiled.
        let train =
            ["train", "run.toml", "--set", "train.device=cuda", "--set", "train.deadline_seconds=200"];
        on_gpus(&[&train, more].concat())
    };
    let numbers = |run| {
        let lines = place.metrics(run);
        let of = |line: &Value| ["loss", "grad_norm", "val_loss"].map(|key| line[key].as_f64());
        lines.iter().flat_map(of).flatten().collect::<Vec<f64>>()
    };
    let same = |run| {
        let (host, gpu) = (numbers("host"), numbers(run));
        let near = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-9 * a.abs();
        assert!(host.len() == gpu.len() && host.iter().zip(&gpu).all(near), "{host:?}\n{gpu:?}");
    };
    place.train(&["--set", "train.output=host"]).ok();
    let said = gpus(&[]).ok();
    for once in
        ["world_size 4", "tokens to train on", "step 3: validation loss", "checkpoint run/", "Next, for"]
    {
        assert_eq!(said.out.matches(once).count(), 1, "{once}: {said:?}");
    }
    same("run");
    gpus(&[]).refused(2, &["rank 0: run already holds a run"]);
    let listed = place.run(&["checkpoint", "verify", "run"]).ok();
    assert_eq!(listed.out.matches(": whole").count(), 2);
    let evaluated = on_gpus(&["eval", "run"]).ok().out;
    assert_eq!(evaluated.lines().count(), 1, "{evaluated}");

    // From step 2 of the host to step 4 on GPUs, and from there on the host.
    let more = |steps| ["--set", "train.output=moved", "--set", steps];
    place.train(&more("train.steps=2")).ok();
    gpus(&[&more("train.steps=4")[..], &["--resume"]].concat()).ok();
    place.train(&[&more("train.steps=6")[..], &["--resume"]].concat()).ok();
    let last = |run| place.metrics(run).iter().rev().find_map(|line| line["val_loss"].as_f64()).unwrap();
    assert!((last("moved") - last("host")).abs() < 1e-9, "{} {}", last("moved"), last("host"));
}

#[test]
fn a_run_writes_metrics_checkpoints_and_a_sample() {
    let place = Place::new();
    let said = place.train(&[]).ok();
    let entropy = said.out.lines().find(|line| line.starts_with("unigram entropy ")).unwrap();
    let number = entropy.strip_prefix("unigram entropy ").unwrap().strip_suffix(" nats/byte").unwrap();
    assert_eq!(number.split_once('.').unwrap().1.len(), 3, "{entropy}");
    let entropy: f64 = number.parse().unwrap();
    assert!(entropy > 1.0 && entropy < 256f64.ln(), "{entropy}");
    assert!(said.out.contains("The "), "no sample: {}", said.out);

    let lines = place.metrics("run");
    let steps: Vec<_> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
    assert_eq!(
        steps.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5, 6]
    );
    for line in &steps {
        for key in ["loss", "grad_norm", "lr", "tokens_per_second", "aux_loss", "z_loss"] {
            assert!(line[key].as_f64().unwrap() > 0.0, "{key}: {line}");
        }
        // Of each of the four ranks: in a layer the projections of attention, scores and values of 16 keys on average, 2 experts of
        // 3 matrices, and the head; 6 operations each.
        let flops = 6.0 * (2.0 * (768.0 + 2.0 * 16.0 * 16.0 + 2.0 * 3.0 * 128.0) + 4096.0);
        let tflops = flops * line["tokens_per_second"].as_f64().unwrap() / 4e12;
        for (key, wanted) in [("tflops_per_rank", tflops), ("mfu", tflops / 0.5)] {
            let found = line[key].as_f64().unwrap();
            assert!((found - wanted).abs() <= 1e-12 * wanted, "{key}: {found}, not {wanted}");
        }
        assert_eq!(line["tokens"].as_u64().unwrap(), line["step"].as_u64().unwrap() * 4 * 32);
        assert_eq!(line["dropped_tokens"], 0);
        assert_eq!(line["reruns"], 0);
        let load = line["expert_load"].as_array().unwrap();
        assert_eq!(load.len(), 2);
        for layer in load {
            let shares: Vec<f64> = layer.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            assert!(shares.len() == 4 && (shares.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{shares:?}");
        }
    }
    // An untrained model knows nothing, one of six steps a little.
    let loss = |line: &Value| line["loss"].as_f64().unwrap();
    assert!((loss(steps[0]) - 256f64.ln()).abs() < 0.2 && loss(steps[5]) < loss(steps[0]));
    // Floats are written with all digits: numbers of f64 have far more than f32 would.
    let text = fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let digits =
        |line: &str| line.split("\"loss\":").nth(1).map(|rest| rest.split(',').next().unwrap().len());
    assert!(text.lines().filter_map(digits).any(|digits| digits >= 16), "{text}");
    let evals: Vec<_> = lines.iter().filter(|line| line.get("val_loss").is_some()).collect();
    assert_eq!(evals.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [3, 6]);
    assert!(evals.iter().all(|line| line.as_object().unwrap().len() == 2));

    // The newest two checkpoints are kept and whole.
    let listed = place.run(&["checkpoint", "ls", "run"]).ok();
    let listed: Vec<_> =
        listed.out.lines().map(|line| line.split_whitespace().nth(1).unwrap().to_owned()).collect();
    assert_eq!(listed, ["4", "6"]);
    let tensors = place.run(&["checkpoint", "ls", "run/checkpoints/step-6"]).ok();
    assert!(tensors.out.contains("model.layers.1.block_sparse_moe.experts.3.w2.weight"), "{}", tensors.out);
    let verified = place.run(&["checkpoint", "verify", "run"]).ok();
    assert_eq!(verified.out.matches(": whole").count(), 2);

    // The resolved configuration starts the same run again.
    let again = place.run(&["train", "run/config.toml", "--set", "train.output=again"]).ok();
    assert!(again.err.is_empty(), "{}", again.err);
    assert_eq!(place.timeless("again"), place.timeless("run"));

    // `eval` and `sample` read the run's folder or one checkpoint.
    for path in ["run", "run/checkpoints/step-6"] {
        let eval = place.run(&["eval", path]).ok();
        let wanted = format!("step 6: validation loss {:.6} nats", evals[1]["val_loss"].as_f64().unwrap());
        assert!(eval.out.starts_with(&wanted), "{} is not {wanted}", eval.out);
    }
    let sample = |seed: &str| {
        let arguments = ["sample", "run", "--prompt", "ranks", "--tokens", "12", "--seed", seed];
        place.run(&arguments).ok().out
    };
    assert!(sample("1").starts_with("ranks") && sample("1") == sample("1") && sample("1") != sample("2"));
}

#[test]
fn a_batch_that_grows_goes_on_from_the_middle_of_its_ramp() {
    let place = Place::new();
    let ramp =
        |samples| format!("train.rampup_batch_size={{ start = 2, increment = 2, samples = {samples} }}");
    let train = |more: &[&str], samples: usize| place.train(&[more, &["--set", &ramp(samples)]].concat());
    train(&["--set", "train.output=whole"], 5).ok();
    let steps = |run| {
        let lines = place.timeless(run);
        lines.into_iter().filter(|line| line.get("loss").is_some()).collect::<Vec<_>>()
    };
    let whole = steps("whole");
    let tokens: Vec<_> = whole.iter().map(|line| line["tokens"].as_u64().unwrap()).collect();
    assert_eq!(tokens, [2, 4, 6, 10, 14, 18].map(|sequences| sequences * 32));

    train(&["--set", "train.steps=2"], 5).ok();
    let before = place.hashes();
    for (said, parts) in [
        (train(&["--resume"], 6), ["samples = 5 }", "samples = 6 } now"]),
        (place.train(&["--resume"]), ["samples = 5 }", "unset now"]),
    ] {
        said.refused(
            2,
            &[&["train.rampup_batch_size was { start = 2, increment = 2, "], &parts[..]].concat(),
        );
    }
    // Single sequences cannot be dealt to two data-parallel ranks.
    let refused = train(&["--resume", "--set", "parallel.tp=1"], 5);
    refused.refused(2, &["[train] rampup_batch_size: start", "2 % (2·2 = 4) = 2", "the nearest: 4"]);
    assert_eq!(place.hashes(), before);
    train(&["--resume"], 5).ok();
    assert_eq!(steps("run"), whole);
}

/// And what is recomputed knows of them.
#[test]
fn documents_are_separated_in_training_and_evaluation() {
    let place = Place::new();
    let train = |run: &str, separate: bool, recompute: &str| {
        // Samples of four documents' length: most have a boundary.
        let (output, separate) =
            (format!("train.output={run}"), format!("data.separate_documents={separate}"));
        let sets = [
            "train.sequence_length=2048",
            "train.steps=2",
            "train.global_batch_size=2",
            &output,
            &separate,
            recompute,
        ];
        place.train(&sets.iter().flat_map(|set| ["--set", set]).collect::<Vec<_>>()).ok();
        let val_loss = |line: &Value| line.get("val_loss")?.as_f64();
        (place.timeless(run)[0]["loss"].clone(), place.metrics(run).iter().find_map(val_loss).unwrap())
    };
    let keep = "train.recompute=[]";
    let (together, apart) = (train("together", false, keep), train("apart", true, keep));
    assert!(together.0 != apart.0 && together.1 != apart.1, "{together:?} and {apart:?}");
    let recompute = "train.recompute=[\"core_attn\", \"layernorm\", \"moe\"]";
    train("recomputed", true, recompute);
    assert_eq!(place.timeless("recomputed"), place.timeless("apart"));
    let sample = place.run(&["sample", "recomputed", "--prompt", "ranks", "--tokens", "12"]).ok();
    assert!(sample.out.starts_with("ranks"), "{}", sample.out);
    let eval = place.run(&["eval", "apart"]).ok();
    assert!(eval.out.starts_with(&format!("step 2: validation loss {:.6} nats", apart.1)), "{}", eval.out);
}

/// What full experts drop is counted, by layer too; the checkpoint is evaluated and sampled as any.
#[test]
fn a_run_with_capacities_counts_what_it_drops() {
    let place = Place::new();
    let sets = ["train.moe_expert_capacity_factor=0.75", "train.steps=3"];
    place.train(&sets.iter().flat_map(|set| ["--set", set]).collect::<Vec<_>>()).ok();
    let lines = place.metrics("run");
    let steps: Vec<_> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
    assert_eq!(steps.len(), 3);
    for line in steps {
        // Two layers, two choices of each of 4·32 tokens, of which at most three quarters are kept.
        let (chosen, dropped) = (2 * 2 * 4 * 32, line["dropped_tokens"].as_u64().unwrap());
        assert!((chosen / 4..chosen).contains(&dropped), "{line}");
        let layers = line["moe_layers"].as_array().unwrap();
        assert!(layers.iter().map(|layer| &layer["layer"]).eq([0, 1]), "{line}");
        let of_layers = layers.iter().map(|layer| layer["dropped_tokens"].as_u64().unwrap());
        assert_eq!(of_layers.sum::<u64>(), dropped, "{line}");
        for layer in layers {
            assert!(layer["aux_loss"].as_f64().unwrap() > 0.0 && layer["z_loss"].as_f64().unwrap() > 0.0);
            assert!(layer["max_expert_load"].as_f64().unwrap() >= 1.0, "{line}");
        }
    }
    let val_loss = lines.iter().rev().find_map(|line| line.get("val_loss")?.as_f64()).unwrap();
    let eval = place.run(&["eval", "run"]).ok();
    assert!(eval.out.starts_with(&format!("step 3: validation loss {val_loss:.6} nats")), "{}", eval.out);
    place.train(&["--set", "train.output=whole", "--set", "train.steps=3"]).ok();
    assert_ne!(place.metrics("whole")[0]["loss"], lines[0]["loss"]);
    let sample = place.run(&["sample", "run", "--prompt", "ranks", "--tokens", "12"]).ok();
    assert!(sample.out.starts_with("ranks"), "{}", sample.out);
}

#[test]
fn completions_are_learnt_under_any_folding() {
    let place = Place::new();
    let lines = |range: std::ops::Range<usize>| -> String {
        let line = |i: usize| {
            format!("{{\"prompt\": \"{i}: \", \"completion\": \"{}.\"}}\n", "ab".repeat(1 + i % 9))
        };
        range.map(line).collect()
    };
    fs::create_dir(place.path("samples")).unwrap();
    fs::write(place.path("samples/a.jsonl"), lines(0..23)).unwrap();
    fs::write(place.path("samples/b.jsonl"), lines(23..50)).unwrap();
    let train = |run: &str, more: &[&str]| {
        let output = format!("train.output={run}");
        let sets = ["data.format=prompt-completion", "data.files=[\"samples/*.jsonl\"]", &output];
        let sets = sets.iter().flat_map(|set| ["--set", set]).collect::<Vec<_>>();
        place.train(&[&sets, more].concat())
    };
    train("run", &[]).ok();
    train(
        "one",
        &[
            "--set",
            "parallel.world_size=1",
            "--set",
            "parallel.tp=1",
            "--set",
            "parallel.pp=1",
            "--set",
            "parallel.ep=1",
        ],
    )
    .ok();
    let losses = |run: &str, key: &str| -> Vec<f64> {
        place.metrics(run).iter().filter_map(|line| line.get(key)?.as_f64()).collect()
    };
    for key in ["loss", "total_loss", "grad_norm", "aux_loss", "z_loss", "val_loss"] {
        let (folded, one) = (losses("run", key), losses("one", key));
        assert!(!one.is_empty() && folded.len() == one.len());
        for (x, y) in folded.iter().zip(&one) {
            assert!((x - y).abs() <= 1e-10 * y.abs(), "{key}: {x} and {y}");
        }
    }
    let eval = place.run(&["eval", "run"]).ok();
    let val_loss = losses("run", "val_loss")[1];
    assert!(eval.out.starts_with(&format!("step 6: validation loss {val_loss:.6} nats")), "{}", eval.out);

    let before = place.hashes();
    let refused =
        train("run", &["--resume", "--set", "data.format=text", "--set", "data.separate_documents=true"]);
    refused.refused(2, &["data.format was prompt-completion", "is text now"]);
    fs::write(place.path("samples/b.jsonl"), lines(0..3) + "{\"prompt\": \"x\"}\n").unwrap();
    train("other", &[]).refused(3, &["samples/b.jsonl:4: missing field `completion`"]);
    fs::write(place.path("samples/b.jsonl"), lines(23..50)).unwrap();
    train("other", &["--set", "train.sequence_length=10"])
        .refused(3, &["samples/a.jsonl:4: 12 tokens", "at most 11"]);
    assert_eq!(place.hashes(), before);
}

#[test]
fn tokens_of_nanogpt_become_either_format_and_are_evaluated() {
    let place = Place::new();
    place.train(&["--set", "train.steps=1"]).ok();
    // Tokens 200 separate 9 documents of 24.
    let tokens: Vec<u8> =
        (1..=9 * 24_u16).flat_map(|i| (if i % 24 == 0 { 200 } else { 7 * i % 199 }).to_le_bytes()).collect();
    fs::write(place.path("nano.bin"), &tokens).unwrap();
    let import = |out: &str, more: &[&str]| {
        let arguments =
            ["data", "import-nanogpt", "nano.bin", "--out", out, "--eot", "200", "--vocab-size", "256"];
        place.run(&[&arguments, more].concat())
    };
    assert_eq!(import("nano.tokens", &[]).ok().out, "9 documents, 216 tokens: nano.tokens\n");
    import("nano", &["--format", "megatron"]).ok();
    let losses =
        ["nano.tokens", "nano"].map(|tokens| place.run(&["eval", "run", "--tokens", tokens]).ok().out);
    assert!(losses[0].contains("validation loss"));
    assert_eq!(losses[0], losses[1]);
    place
        .run(&["eval", "run", "--tokens", "nano.bin"])
        .refused(3, &["no token file", "moe-train data import-nanogpt"]);
    place.run(&["eval", "run", "--tokens", "nano.idx"]).refused(3, &["named without .bin and .idx"]);

    fs::write(place.path("nano.bin"), &tokens[1..]).unwrap();
    import("nano.tokens", &[]).refused(3, &["nano.bin: 431 bytes, but every token has two"]);
    assert!(
        place.run(&["eval", "run", "--tokens", "nano.tokens"]).ok().out == losses[0],
        "the old file is left"
    );
    fs::write(place.path("nano.bin"), [0, 1]).unwrap();
    import("large", &[]).refused(3, &["token 256 is not below the vocabulary of 256"]);
    assert!(!place.path("large").exists());
}

#[test]
fn files_of_tokens_are_inspected_and_verified() {
    let place = Place::new();
    let text: Vec<u8> = "a€\n|bc\n|".bytes().flat_map(|byte| u16::from(byte).to_le_bytes()).collect();
    fs::write(place.path("nano.bin"), text).unwrap();
    for (name, format) in [("text.tokens", "tokens"), ("text", "megatron")] {
        let arguments = ["data", "import-nanogpt", "nano.bin", "--out", name, "--format", format];
        place.run(&[&arguments[..], &["--eot", "124", "--vocab-size", "256"]].concat()).ok();
        let inspect = |more: &[&str]| place.run(&[&["data", "inspect", name], more].concat());
        let said = inspect(&[]).ok().out;
        assert!(said.contains("10 tokens in 2 documents\n"), "{said}");
        assert_eq!(inspect(&["--document", "1"]).ok().out, "98 99 10 124\n");
        assert_eq!(inspect(&["--document", "0", "--tokenizer", "byte"]).ok().out, "a€\n|\n");
        inspect(&["--document", "2"]).refused(3, &["text", "documents"]);
        assert_eq!(place.run(&["data", "verify", name]).ok().out, format!("{name}: whole\n"));
    }
    let said = place.run(&["data", "inspect", "text.tokens"]).ok().out;
    assert_eq!(said, "text.tokens: token file\n10 tokens in 2 documents\nvocabulary 256\n");
    let said = place.run(&["data", "inspect", "text"]).ok().out;
    assert!(said.contains("text: Megatron dataset of U16, 2 sequences\n"), "{said}");
    assert!(said.ends_with("vocabulary not recorded\n"), "{said}");

    // One bit of each, in the tokens; the others are still said to be whole.
    let flip = |name: &str, at: usize| {
        let mut bytes = fs::read(place.path(name)).unwrap();
        bytes[at] ^= 1;
        fs::write(place.path(name), bytes).unwrap();
    };
    flip("text.bin", 0);
    let said = place
        .run(&["data", "verify", "text", "text.tokens"])
        .refused(3, &["dataset text: the .bin is damaged"]);
    assert_eq!(said.out, "text.tokens: whole\n");
    flip("text.tokens", 131);
    place.run(&["data", "verify", "text.tokens"]).refused(3, &["text.tokens"]);
    flip("text.bin", 0);
    fs::remove_file(place.path("text.blake3.json")).unwrap();
    let said = place.run(&["data", "verify", "text"]).ok().out;
    assert_eq!(said, "text: well formed; it has no checksums to compare with\n");
    place.run(&["data", "verify", "nowhere"]).refused(3, &["nowhere"]);
}

/// From JSON lines and text to a run under a folding, in either format.
#[test]
fn corpora_are_prepared_inspected_verified_and_trained_on() {
    let place = Place::new();
    let lines = (0..40).map(|i| format!("{{\"id\": {i}, \"body\": \"{}\"}}\n", "fold ".repeat(i)));
    fs::write(place.path("lines.jsonl"), lines.collect::<String>()).unwrap();
    let prepare = |more: &[&str]| {
        place.run(&[&["data", "prepare", "lines.jsonl", "text/1.txt", "--field", "body"], more].concat())
    };
    for (out, format, kind) in
        [("c.tokens", "tokens", "token file"), ("c", "megatron", "Megatron dataset of U16, 40 sequences")]
    {
        let said = prepare(&["--tokenizer", "byte", "--out", out, "--format", format, "--threads", "3"]).ok();
        let text = fs::metadata(place.path("text/1.txt")).unwrap().len();
        let tokens = 5 * (0..40).sum::<u64>() + text;
        let wanted = format!("1 empty documents were passed over\n40 documents, {tokens} tokens: {out}\n");
        assert_eq!(said.out, wanted);
        assert!(!place.path(&format!("{out}.parts")).exists());
        let said = place.run(&["data", "inspect", out]).ok().out;
        assert!(said.starts_with(&format!("{out}: {kind}\n{tokens} tokens in 40 documents\n")), "{said}");
        let said = place.run(&["data", "inspect", out, "--document", "1", "--tokenizer", "byte"]).ok().out;
        assert_eq!(said, "fold fold \n");
        assert_eq!(place.run(&["data", "verify", out]).ok().out, format!("{out}: whole\n"));
        let blend = format!("data.blend=[{{ path = '{out}' }}]");
        let output = format!("train.output=run-{format}");
        let sets = ["data.files=[]", &blend, "data.held_out=0.2", &output];
        place.train(&sets.iter().flat_map(|set| ["--set", set]).collect::<Vec<_>>()).ok();
    }
    assert_eq!(place.timeless("run-tokens").len(), place.timeless("run-megatron").len());
    let losses = |run: &str| -> Vec<Value> {
        place.timeless(run).into_iter().filter_map(|line| line.get("loss").cloned()).collect()
    };
    assert_eq!(losses("run-tokens").len(), 6);
    assert_eq!(losses("run-tokens"), losses("run-megatron"));

    fs::write(place.path("lines.jsonl"), "{\"body\": \"a\"}\n{\"text\": \"b\"}\n").unwrap();
    prepare(&["--tokenizer", "byte", "--out", "new"])
        .refused(3, &["lines.jsonl:2: missing field `body` (column 13)"]);
    let mut other = vec!["data", "prepare", "run.toml", "--tokenizer", "byte", "--out", "new"];
    place.run(&other).refused(3, &["run.toml", "--input-format"]);
    other.extend(["--input-format", "text"]);
    place.run(&other).refused(3, &["new.parts has parts of the input lines.jsonl, where run.toml is now"]);
    fs::remove_dir_all(place.path("new.parts")).unwrap();
    assert!(place.run(&other).ok().out.starts_with("1 documents"));
}

/// Killed when a part is complete, and again in between: the result is that of one that was not.
#[cfg(feature = "tokenizers")]
#[test]
fn a_killed_preparation_goes_on() {
    let place = Place::new();
    let lines = (0..6000).map(|i| {
        let words = (0..160).map(|k| ["the", "ranks", "fold", "für", "3 €"][(i * k + k * k) % 5]);
        format!("{{\"text\": \"{}\"}}\n", words.collect::<Vec<_>>().join(" "))
    });
    fs::write(place.path("lines.jsonl"), lines.collect::<String>()).unwrap();
    let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer");
    let arguments = |out| ["data", "prepare", "lines.jsonl", "--tokenizer", tokenizer, "--out", out];
    let said = place.run(&arguments("whole")).ok().out;
    assert!(said.starts_with("documents end with <|endoftext|> (1)\n6000 documents, "), "{said}");
    for part in 0..2 {
        let mut child = place.command(&arguments("out")).stdout(Stdio::null()).spawn().unwrap();
        let part = place.path(&format!("out.parts/part-{part:06}.tokens"));
        while !part.exists() && child.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    place.run(&arguments("out")).ok();
    // Not `assert_eq`, which would print both.
    assert!(fs::read(place.path("out")).unwrap() == fs::read(place.path("whole")).unwrap());
    let left = fs::read_dir(place.0.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with("out")).collect();
    assert_eq!(left, ["out"]);
}

/// A token file and a dataset of Megatron, of which other samples are used than of one alone, whatever the folding.
#[test]
fn blends_are_the_same_under_any_folding_and_go_on() {
    let place = Place::new();
    let import = |name: &str, more: &[&str], documents: u16, step: u16| {
        // Documents of 24 tokens, which are told apart by their step.
        let token = |i: u16| if i.is_multiple_of(24) { 200 } else { step * i % 199 };
        let tokens: Vec<u8> = (1..=documents * 24).flat_map(|i| token(i).to_le_bytes()).collect();
        fs::write(place.path("nano.bin"), &tokens).unwrap();
        let arguments =
            ["data", "import-nanogpt", "nano.bin", "--out", name, "--eot", "200", "--vocab-size", "256"];
        place.run(&[&arguments, more].concat()).ok();
    };
    import("a.tokens", &[], 9, 7);
    import("b", &["--format", "megatron"], 31, 11);
    import("held", &["--format", "megatron"], 5, 7);
    import("held.tokens", &[], 4, 11);
    let blend = "data.blend=[{ path = 'a.tokens', weight = 1 }, { path = 'b', weight = 3 }]";
    let of_blend = ["data.files=[]", blend, "data.validation=['held', 'held.tokens']"];
    let text = fs::read_to_string(place.path("run.toml")).unwrap().replace("held_out = 0.3", "");
    fs::write(place.path("run.toml"), text).unwrap();
    let train = |sets: &[&str], more: &[&str]| {
        let sets = of_blend.iter().chain(sets).flat_map(|set| ["--set", set]);
        let arguments: Vec<&str> = sets.chain(more.iter().copied()).collect();
        place.train(&arguments)
    };
    let said = train(&[], &[]).ok();
    assert!(said.out.contains("b: weight 3, 744 tokens in 31 documents, 23 samples"), "{}", said.out);
    assert!(!place.path("run/data").exists());
    assert!(
        said.out.contains("no sample: data.tokenizer") && !said.out.contains("another prompt"),
        "{said:?}"
    );
    let one = ["parallel.world_size=2", "parallel.tp=1", "parallel.pp=1", "train.output=one"];
    train(&one, &[]).ok();
    let values = |run: &str, key: &str| -> Vec<f64> {
        place.metrics(run).iter().filter_map(|line| line.get(key)?.as_f64()).collect()
    };
    for key in ["loss", "grad_norm", "val_loss"] {
        let (folded, one) = (values("run", key), values("one", key));
        assert!(!one.is_empty() && folded.len() == one.len());
        for (x, y) in folded.iter().zip(&one) {
            assert!((x - y).abs() <= 1e-10 * y.abs(), "{key}: {x} and {y}");
        }
    }

    let lines = place.metrics("run");
    let tokens = |line: &Value| -> Option<(u64, u64, u64)> {
        let of = line.get("blend_tokens")?.as_array()?;
        Some((line["tokens"].as_u64()?, of[0].as_u64()?, of[1].as_u64()?))
    };
    let steps: Vec<_> = lines.iter().filter_map(tokens).collect();
    assert_eq!(steps.len(), 6);
    assert!(steps.iter().all(|&(all, a, b)| a + b == all && a % 32 == 0), "{steps:?}");
    assert!(steps[5].1 > 0 && steps[5].1 < steps[5].2, "{steps:?}");
    let eval = lines.iter().rev().find(|line| line.get("val_loss").is_some()).unwrap();
    let sets = eval["val_losses"].as_array().unwrap();
    assert_eq!((sets[0]["path"].as_str(), sets[1]["path"].as_str()), (Some("held"), Some("held.tokens")));
    let losses = [0, 1].map(|i: usize| sets[i]["loss"].as_f64().unwrap());
    assert_eq!((losses[0] + losses[1]) / 2.0, eval["val_loss"].as_f64().unwrap());
    let said = place.run(&["eval", "run"]).ok();
    for (line, (loss, set)) in said.out.lines().zip(losses.iter().zip(["held", "held.tokens"])) {
        assert!(line.starts_with(&format!("step 6: validation loss {loss:.6} nats")), "{line}");
        assert!(line.ends_with(&format!(" on {set}")), "{line}");
    }

    // From step 4 on as if nothing had happened, under another folding, with the data elsewhere.
    fs::remove_dir_all(place.path("run/checkpoints/step-6")).unwrap();
    fs::rename(place.path("a.tokens"), place.path("moved.tokens")).unwrap();
    let moved = "data.blend=[{ path = 'moved.tokens', weight = 1 }, { path = 'b', weight = 3 }]";
    train(&[moved, "parallel.tp=1", "parallel.ep=1"], &["--resume"]).ok();
    assert_eq!(values("run", "loss").len(), 6);
    for (x, y) in values("run", "loss").iter().zip(&values("one", "loss")) {
        assert!((x - y).abs() <= 1e-10 * y.abs(), "{x} and {y}");
    }

    // Documents of the blend itself: two of 9, six of 31.
    let own = ["train.output=own", moved, "data.validation=[]", "data.held_out=0.2"];
    let said = train(&own, &[]).ok();
    assert!(
        said.out.contains("b: weight 3, 744 tokens in 31 documents, the last 6 held out, 18 samples"),
        "{said:?}"
    );
    let eval = place.run(&["eval", "own"]).ok();
    assert!(
        eval.out.lines().map(|line| line.split(" on ").last().unwrap()).eq(["moved.tokens", "b"]),
        "{eval:?}"
    );
    let none = ["train.output=none", moved, "data.validation=[]", "train.eval_interval=0", "train.steps=1"];
    assert!(!train(&none, &[]).ok().out.contains("validation loss"));
    place.run(&["eval", "none"]).refused(2, &["--tokens is needed with a run that was evaluated on nothing"]);

    let refused = |sets: &[&str], more: &[&str], status: i32, parts: &[&str]| {
        train(sets, more).refused(status, parts);
    };
    let resume = ["--resume"];
    let other = "data.blend=[{ path = 'moved.tokens', weight = 1 }, { path = 'b', weight = 4 }]";
    refused(&[other], &resume, 2, &["weights of [[data.blend]] was [1.0, 3.0]", "is [1.0, 4.0] now"]);
    let other = "data.blend=[{ path = 'moved.tokens', weight = 1 }, { path = 'held', weight = 3 }]";
    refused(&[other], &resume, 2, &["samples in each [[data.blend]] was [6, 23]", "is [6, 3] now"]);
    let new = "train.output=new";
    refused(&[new], &[], 3, &["a.tokens: there is no token file of that name, nor a .bin and an .idx"]);
    refused(
        &[new, moved, "train.sequence_length=216"],
        &[],
        3,
        &["moved.tokens has 216 tokens, but one sequence needs 217"],
    );
    refused(
        &[new, moved, "data.format=prompt-completion"],
        &[],
        3,
        &["moved.tokens has no prompts with completions"],
    );
    refused(
        &[new, moved, "model.vocab_size=199"],
        &[],
        3,
        &["vocabulary of 256 tokens, more than the model's 199"],
    );
    let megatron = "data.blend=[{ path = 'b' }]";
    refused(
        &[
            "train.output=foreign",
            megatron,
            "data.validation=[]",
            "train.eval_interval=0",
            "model.vocab_size=199",
        ],
        &[],
        3,
        &["b: token ", " is 200, but the model's vocabulary has 199"],
    );
    place.run(&["data", "import-nanogpt", "nano.bin", "--out", "c.tokens", "--vocab-size", "300"]).ok();
    let other = "data.blend=[{ path = 'moved.tokens' }, { path = 'c.tokens' }]";
    refused(
        &[new, other, "model.vocab_size=300"],
        &[],
        3,
        &["c.tokens has a vocabulary of 300", "moved.tokens has one of 256"],
    );
    assert!(!place.path("new/checkpoints").exists());
}

#[test]
fn topology_prints_the_groups_of_megatron() {
    let place = Place::new();
    let arguments = "topology --world-size 128 --tp 2 --cp 1 --pp 8 --ep 8 --etp 1 --format json";
    let said = place.run(&arguments.split(' ').collect::<Vec<_>>()).ok();
    let found: Value = serde_json::from_str(&said.out).unwrap();
    let golden: Value = serde_json::from_str(include_str!("fixtures/groups_w128_tp2_pp8_ep8.json")).unwrap();
    assert_eq!((&found["world_size"], &found["order"]), (&Value::from(128), &Value::from("tp-cp-ep-dp-pp")));
    let names = |view: &str, pairs: &[(&str, &str)]| {
        assert_eq!(found[view].as_object().unwrap().len(), pairs.len(), "{view}");
        for (ours, megatron) in pairs {
            assert_eq!(found[view][ours], golden[megatron], "{view} {ours}");
        }
    };
    names(
        "attention",
        &[
            ("tp", "tp"),
            ("cp", "cp"),
            ("dp", "dp"),
            ("pp", "pp"),
            ("tp-cp", "tp_cp"),
            ("dp-cp", "dp_cp"),
            ("tp-pp", "mp"),
        ],
    );
    names(
        "moe",
        &[
            ("etp", "expt_tp"),
            ("ep", "ep"),
            ("edp", "expt_dp"),
            ("pp", "pp"),
            ("etp-ep", "tp_ep"),
            ("etp-ep-pp", "tp_ep_pp"),
        ],
    );

    let drawn = |format: &str| {
        place.run(&["topology", "--world-size", "8", "--tp", "2", "--ep", "4", "--format", format]).ok()
    };
    assert!(drawn("svg").out.starts_with("<svg"));

    let context = |ulysses: &str, format: &str| {
        let arguments =
            ["--world-size", "8", "--tp", "2", "--cp", "4", "--cp-ulysses", ulysses, "--format", format];
        place.run(&[&["topology"], &arguments[..]].concat())
    };
    let both = context("2", "text").ok().out;
    assert!(both.contains("cp 4 (inner 2, outer 2)"), "{both}");
    assert!(
        both.ends_with(
            "attention over cp: all-to-all of heads (Ulysses) among 2 ranks, as [0 2]; a ring of 2 ranks, as [0 4]\n"
        ),
        "{both}"
    );
    assert!(context("1", "text").ok().out.ends_with("attention over cp: a ring of 4 ranks, as [0 2 4 6]\n"));
    assert!(context("4", "text").ok().out.contains("(Ulysses) among 4 ranks, as [0 2 4 6]\n"));
    let found: Value = serde_json::from_str(&context("2", "json").ok().out).unwrap();
    assert_eq!(found["attention"]["cp.inner"], serde_json::json!([[0, 2], [1, 3], [4, 6], [5, 7]]));
    assert_eq!(found["attention"]["cp.outer"], serde_json::json!([[0, 4], [1, 5], [2, 6], [3, 7]]));
    context("3", "text").refused(2, &["cp must be a multiple of cp_ulysses", "4 % 3"]);
    assert!(drawn("text").out.contains("tp"));
}

#[test]
fn schedules_are_shown_checked_simulated_and_compared() {
    let place = Place::new();
    let run = |arguments: &str| place.run(&arguments.split(' ').collect::<Vec<_>>());
    let torch =
        |name: &str, sizes: &str| run(&format!("schedule show {name} --format torch-csv {sizes}")).ok().out;

    // As torch 2.15.0 has it, without and with messages.
    assert_eq!(
        torch("InterleavedZeroBubble", "--pp 2 --vpp 1 --microbatches 4"),
        "0F0,0F1,0I0,0W0,0F2,0I1,0W1,0F3,0I2,0W2,0I3,0W3\n1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W1,1F3,1I3,1W2,1W3\n"
    );
    assert_eq!(
        torch("InterleavedZeroBubble", "--pp 2 --vpp 1 --microbatches 4 --lowered"),
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0I0,0W0,0RECV_B1,0F2,0SEND_F2,0I1,0W1,0RECV_B2,0F3,0SEND_F3,0I2,0W2,\
         0RECV_B3,0I3,0W3\n\
         1RECV_F0,1F0,1RECV_F1,1I0,1SEND_B0,1F1,1I1,1SEND_B1,1RECV_F2,1W0,1F2,1I2,1SEND_B2,1RECV_F3,1W1,1F3,1I3,\
         1SEND_B3,1W2,1W3\n"
    );
    assert_eq!(
        torch("zb-v", "--pp 2 --microbatches 3"),
        torch("ZBVZeroBubble", "--pp 2 --vpp 2 --microbatches 3")
    );

    // Whatever is shown is checked, with messages or without.
    for (name, lowered) in [("dual-pipe-v", ""), ("dual-pipe", " --lowered"), ("v-half", " --lowered")] {
        for format in ["csv", "torch-csv"] {
            let shown =
                run(&format!("schedule show {name} --pp 4 --microbatches 8 --format {format}{lowered}"))
                    .ok()
                    .out;
            fs::write(place.path("schedule.csv"), shown).unwrap();
            let said = run("schedule check schedule.csv").ok().out;
            assert!(
                said.starts_with("valid: 4 ranks, 8 stages, 8 micro-batches forward and backward, "),
                "{said}"
            );
        }
    }
    run("schedule check schedule.csv --budget 5").refused(2, &["rank 0", "6 activations", "the budget of 5"]);
    fs::write(place.path("schedule.csv"), "0F0,0F1,0B1,0B0\n").unwrap();
    run("schedule check schedule.csv")
        .refused(2, &["0B1 (rank 0, index 2): micro-batch 0 of this stage comes first"]);

    let picture = run("schedule show 1f1b --pp 3 --microbatches 4 --columns 54").ok().out;
    assert_eq!(
        picture,
        "rank 0 0--1--2--............0=====3--1=====...2=====...3=====\n\
         rank 1 ...0--1--......0=====2--1=====3--2=====...3=====......\n\
         rank 2 ......0--0=====1--1=====2--2=====3--3=====............\n\
         step 18, 33.3% idle; activations of a stage kept at most, by rank: 3 2 1\n"
    );
    let drawn = |format: &str| {
        run(&format!("schedule show dual-pipe --pp 4 --microbatches 8 --format {format}")).ok().out
    };
    assert!(drawn("svg").starts_with("<svg") && drawn("svg").ends_with("</svg>\n"));
    let trace: Value = serde_json::from_str(&drawn("trace")).unwrap();
    let spans = trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X");
    let first = spans.clone().find(|event| event["tid"] == 3).unwrap();
    assert_eq!((&first["name"], &first["ts"], &first["dur"]), (&"4F4".into(), &0.into(), &1.into()));

    // (p−1)(f+b) in halves of a rank's layers, and what a rank waits for.
    let simulated = run("schedule simulate interleaved-1f1b --pp 2 --microbatches 4 --times 2,2,2").ok().out;
    assert_eq!(
        simulated,
        "rank  busy  all-to-all  activation  gradient  link  send  drain  kept\n\
         0       24           0           0         3     0     0      0     5\n\
         1       24           0           1         0     0     0      2     3\n\
         step 27, 11.1% idle; activations of a stage kept at most, by rank: 5 3\n"
    );

    // From a file, with messages or without; by stages that are not alike, 1F1B waits for the slowest.
    for lowered in ["", " --lowered"] {
        let shown =
            run(&format!("schedule show 1f1b --pp 2 --microbatches 4 --format csv{lowered}")).ok().out;
        fs::write(place.path("schedule.csv"), shown).unwrap();
        let simulate = |from: &str, times: &str| run(&format!("schedule simulate {from} {times}")).ok().out;
        for times in ["--times 2,2,2 --link 0.5,0.25", "--stage-times 1,1,1;2,2,3"] {
            let named = simulate("1f1b --pp 2 --microbatches 4", times);
            assert_eq!(simulate("--file schedule.csv", times), named);
        }
        let uneven = simulate("--file schedule.csv", "--stage-times 1,1,1;2,2,3");
        assert!(
            uneven.ends_with("step 31, 35.5% idle; activations of a stage kept at most, by rank: 2 1\n"),
            "{uneven}"
        );
    }
    run("schedule simulate --file schedule.csv --pp 2").refused(2, &["--file", "--pp"]);
    run("schedule simulate --file schedule.csv 1f1b").refused(2, &["--file"]);
    run("schedule simulate 1f1b --pp 2").refused(2, &["--microbatches"]);
    run("schedule simulate 1f1b").refused(2, &["--pp", "--microbatches"]);
    run("schedule simulate --pp 2 --microbatches 4").refused(2, &["<NAME>"]);
    run("schedule simulate").refused(2, &["NAME", "--pp"]);
    run("schedule simulate 1f1b --pp 2 --microbatches 2 --stage-times 1,1,1")
        .refused(2, &["1 costs for 2 stages"]);

    // Two layers of experts per rank, whose all-to-alls take as long as half of what they compute: overlaps hide them.
    let step = |name: &str| {
        let said =
            run(&format!("schedule simulate {name} --pp 2 --microbatches 8 --layers 2 --all-to-all 0.25"))
                .ok()
                .out;
        let step = said.split("step ").nth(1).and_then(|rest| rest.split(',').next());
        step.unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(step("1f1b"), (8.0 + 1.0) * (3.0 + 2.0));
    assert!(step("overlapped-1f1b --vpp 1") < 0.8 * step("1f1b"));

    let compared = run("schedule compare --pp 4 --microbatches 8").ok().out;
    let rows: BTreeMap<&str, Vec<&str>> = compared
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .map(|row| (row[0], row[1..].to_vec()))
        .collect();
    assert_eq!(rows["1f1b"], ["1", "33", "27.3%", "4"]);
    assert_eq!(rows["zb-h2"], ["1", "27", "11.1%", "7"]);
    assert_eq!(rows["zb-v"], ["2", "25.5", "5.9%", "4"]);
    assert_eq!(rows["v-half"], ["2", "26.5", "9.4%", "3"]);
    // The searches may keep as much as 1F1B, and find no worse than ZB-V does with that.
    assert_eq!(rows["for-costs-v"], rows["zb-v"]);
    assert_eq!(rows["for-costs"][3], "4");
    assert_eq!(rows.len(), 1 + 13 + 3);
    let compared = run("schedule compare --pp 4 --microbatches 8 --activations 2").ok().out;
    let line = compared.lines().find(|line| line.starts_with("for-costs-v "));
    let kept = line.and_then(|line| line.split_whitespace().last());
    assert!(kept.is_some_and(|kept| kept.parse::<f64>().unwrap() <= 2.0), "{compared}");
    let compared = run("schedule compare --pp 3 --microbatches 3").ok().out;
    assert!(
        compared.ends_with(
            "dual-pipe-v: DualPipeV on 3 ranks cannot take 3 micro-batches: it needs at least 6\n"
        )
    );

    run("schedule show zb-v --pp 2 --vpp 3 --microbatches 2")
        .refused(2, &["zb-v has 2 stage(s) per rank, not 3"]);
    run("schedule show zbv --pp 2 --microbatches 2").refused(2, &["is no schedule", "zb-v", "dual-pipe"]);
    run("schedule show 1f1b --pp 2 --microbatches 2 --times 1,2")
        .refused(2, &["3 numbers separated by commas"]);
    run("schedule show 1f1b --pp 2 --microbatches 2 --times 1,1,-1")
        .refused(2, &["costs are finite and not negative"]);
}

#[test]
fn illegal_mappings_say_the_equation_the_values_and_what_is_near() {
    let place = Place::new();
    let before = place.hashes();
    place
        .run(&["topology", "--world-size", "8", "--tp", "3"])
        .refused(2, &["world_size must be a multiple of tp·cp·pp", "8 % (3·1·1 = 3) = 2", "nearest"]);
    place
        .run(&["topology", "--world-size", "8", "--ep", "3"])
        .refused(2, &["8 % (1·3·1 = 3) = 2", "nearest"]);
    place.run(&["topology", "--world-size", "8", "--order", "tp-zp-dp"]).refused(2, &["zp"]);
    let refused = |sets: &[&str], parts: &[&str]| {
        let arguments: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        place.train(&arguments).refused(2, parts);
    };
    refused(&["parallel.tp=3"], &["[parallel]", "4 % (3·1·2 = 6) = 4", "nearest"]);
    // Experts by EP, heads by TP, the batch by DP, layers by PP.
    refused(&["model.num_local_experts=3"], &["experts must be a multiple of ep", "3 % 2", "nearest"]);
    refused(
        &["model.num_attention_heads=3", "model.num_key_value_heads=3", "model.head_dim=4"],
        &["heads", "3 % 2", "nearest"],
    );
    refused(&["model.intermediate_size=9", "parallel.etp=2", "parallel.ep=1"], &["9 % 2", "nearest"]);
    refused(&["parallel.tp=1", "parallel.pp=1"], &["global_batch_size", "4 % (2·4 = 8) = 4", "nearest"]);
    refused(&["train.global_batch_size=3"], &["3 % (2·1 = 2) = 1", "no mapping of world_size 4 is legal"]);
    refused(&["parallel.world_size=16", "parallel.pp=4"], &["pp", "nearest"]);
    assert_eq!(place.hashes(), before);
}

#[test]
fn a_misspelt_config_says_the_nearest_name() {
    let place = Place::new();
    let before = place.hashes();
    place
        .train(&["--set", "train.step=3"])
        .refused(2, &["unknown key \"step\" in [train]", "did you mean \"steps\"?"]);
    place
        .train(&["--set", "optimizer.steps=3"])
        .refused(2, &["unknown key \"steps\"", "it belongs in [train]"]);
    place.train(&["--set", "trian.steps=3"]).refused(2, &["trian", "did you mean \"train\"?"]);
    place.train(&["--set", "train.steps"]).refused(2, &["--set train.steps", "table.key=value"]);
    place.train(&["--set", "train.steps=many"]).refused(2, &["[train] steps", "many"]);
    place.train(&["--set", "train.dtype=f16"]).refused(2, &["dtype", "f16", "f32", "f64"]);
    place.run(&["train", "missing.toml"]).refused(2, &["cannot read missing.toml"]);
    fs::write(place.path("broken.toml"), "[train\n").unwrap();
    place.run(&["train", "broken.toml"]).refused(2, &["broken.toml is not valid TOML", "line 1"]);
    fs::remove_file(place.path("broken.toml")).unwrap();
    assert_eq!(place.hashes(), before);
}

#[test]
fn missing_and_empty_data_are_named() {
    let place = Place::new();
    place
        .train(&["--set", "data.files=['text/*.txt', 'absent/*.md']"])
        .refused(3, &["\"absent/*.md\" in data.files matches no file", place.0.path().to_str().unwrap()]);
    place.train(&["--set", "data.files=['te[xt']"]).refused(3, &["te[xt"]);
    fs::write(place.path("text/3.txt"), "").unwrap();
    place.train(&[]).refused(3, &["text/3.txt is empty"]);
    place.train(&["--set", "data.files=['text/0.txt']"]).refused(3, &["only one document"]);
    place
        .train(&["--set", "data.files=['text/[01].txt']", "--set", "train.sequence_length=2000"])
        .refused(3, &[".tokens has ", "one sequence needs 2001"]);
    // None of them started a run: the folder is free.
    fs::write(place.path("text/3.txt"), "no longer empty").unwrap();
    place.train(&[]).ok();
}

#[test]
fn a_run_is_never_overwritten() {
    let place = Place::new();
    place.train(&["--set", "train.steps=2"]).ok();
    let before = place.hashes();
    place.train(&[]).refused(2, &["run already holds a run", "--resume", "train.output"]);
    assert_eq!(place.hashes(), before);
}

#[test]
fn a_run_that_keeps_no_checkpoint_writes_none() {
    let place = Place::new();
    let none = ["--set", "train.keep_checkpoints=0"];
    place.train(&none).refused(2, &["train.save_interval has no meaning", "train.keep_checkpoints = 0"]);
    let said = place.train(&[&none[..], &["--set", "train.save_interval=0"]].concat()).ok();
    assert!(said.out.contains("validation loss"), "{said:?}");
    assert!(!said.out.contains("checkpoint"), "{said:?}");
    assert!(!place.path("run/checkpoints").exists());
    // It computed what a run computes that saves.
    place.train(&["--set", "train.output=whole"]).ok();
    assert_same_metrics(&place);
    place.train(&["--resume"]).refused(4, &["run/checkpoints"]);
}

#[test]
fn damaged_checkpoints_are_named_and_passed_over() {
    let place = Place::new();
    place.train(&[]).ok();
    let whole = place.timeless("run");
    let newest = place.path("run/checkpoints/step-6/rank-00001.bin");
    let good = fs::read(&newest).unwrap();

    flip(&newest);
    for path in ["run", "run/checkpoints/step-6"] {
        place
            .run(&["checkpoint", "verify", path])
            .refused(4, &["step-6", "rank-00001.bin", "checksum", ".weight"]);
    }
    place.run(&["eval", "run/checkpoints/step-6"]).refused(4, &["step-6", "rank-00001.bin", "checksum"]);
    place.run(&["sample", "run/checkpoints/step-6"]).refused(4, &["step-6", "rank-00001.bin", "checksum"]);
    fs::write(&newest, &good).unwrap();
    truncate(&newest);
    place.run(&["checkpoint", "verify", "run"]).refused(4, &["step-6", "rank-00001.bin has ", "is cut off"]);

    // The older one is whole: the run goes on from it, says so, and comes to the same end.
    let resumed = place.train(&["--resume"]).ok();
    assert!(
        resumed.err.contains("warning: skipped: ") && resumed.err.contains("rank-00001.bin"),
        "{resumed:?}"
    );
    assert!(resumed.out.contains("resuming after step 4"), "{resumed:?}");
    assert_eq!(place.timeless("run"), whole);
    let verified = place.run(&["checkpoint", "verify", "run"]).ok();
    assert_eq!(verified.out.matches(": whole").count(), 2, "{verified:?}");
    // The damaged one is still there to look at.
    let aside = resumed.err.split("the damaged checkpoint is kept as ").nth(1).unwrap().trim_end();
    assert_eq!(fs::read(place.path(aside).join("rank-00001.bin")).unwrap(), good[..good.len() - 5]);
    assert_eq!(fs::read(place.path("run/checkpoints/step-6/rank-00001.bin")).unwrap(), good);

    truncate(&newest);
    flip(&place.path("run/checkpoints/step-4/manifest.json"));
    let before = place.hashes();
    let refused = place.train(&["--resume"]).refused(4, &["none of the 2 checkpoints", "run/checkpoints"]);
    assert_eq!(refused.err.matches("warning: skipped: ").count(), 2, "{refused:?}");
    place.run(&["eval", "run"]).refused(4, &["none of the 2 checkpoints"]);
    place.train(&["--resume", "--set", "train.output=elsewhere"]).refused(4, &["elsewhere"]);
    assert_eq!(place.hashes(), before);
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let place = Place::new();
    place.train(&["--set", "train.steps=2"]).ok();
    let before = place.hashes();
    for (set, parts) in [
        ("model.hidden_size=32", ["is of another model", "hidden_size is 16 there and 32 here"]),
        ("model.num_local_experts=8", ["is of another model", "num_local_experts is 4 there and 8 here"]),
    ] {
        place.train(&["--resume", "--set", set]).refused(4, &parts);
    }
    // What the order of samples or the numbers depend on cannot change in the middle of a run.
    for (set, parts) in [
        ("train.seed=9", ["train.seed was 0", "is 9 now"]),
        ("train.global_batch_size=8", ["train.global_batch_size was 4", "is 8 now"]),
        ("train.dtype=f32", ["train.dtype was f64", "is f32 now"]),
        ("data.separate_documents=true", ["data.separate_documents was false", "is true now"]),
    ] {
        place.train(&["--resume", "--set", set]).refused(2, &parts);
    }
    assert_eq!(place.hashes(), before);
}

#[test]
fn a_run_goes_on_under_another_folding() {
    let place = Place::new();
    place.train(&["--set", "train.output=whole"]).ok();
    place.train(&["--set", "train.steps=2"]).ok();
    // TP1 × DP2 with ETP2.
    let folding =
        ["parallel.world_size=2", "parallel.tp=1", "parallel.pp=1", "parallel.ep=1", "parallel.etp=2"];
    let sets = folding.iter().flat_map(|set| ["--set", set]);
    let resumed = place.train(&["--resume"].into_iter().chain(sets).collect::<Vec<_>>()).ok();
    assert!(resumed.out.contains("resuming after step 2"), "{resumed:?}");
    let losses = |run: &str| -> Vec<f64> {
        place.metrics(run).iter().filter_map(|line| line.get("loss")?.as_f64()).collect()
    };
    let (whole, resumed) = (losses("whole"), losses("run"));
    assert_eq!(whole.len(), resumed.len());
    for (x, y) in whole.iter().zip(&resumed) {
        assert!((x - y).abs() <= 1e-10 * y, "{x} and {y}");
    }
}

/// The last words of a run are commands that are granted: another TP is named only where the run could go on with it.
#[test]
fn what_a_run_says_to_go_on_with_goes_on() {
    let place = Place::new();
    // With TP1 two ranks in a V would have two micro-batches each, of the four that they need.
    let in_a_v = [
        "model.num_hidden_layers=4",
        "parallel.schedule=dual-pipe-v",
        "parallel.vpp=2",
        "train.micro_batch_size=1",
    ];
    // And two data-parallel ranks could not be dealt the first step.
    let ramp_up = ["train.rampup_batch_size={ start = 2, increment = 2, samples = 2 }"];
    for (run, sets, refolds) in [("plain", &[][..], true), ("v", &in_a_v, false), ("ramp", &ramp_up, false)] {
        let output = format!("train.output={run}");
        let sets = sets.iter().copied().chain([&*output, "train.steps=2"]);
        let said = place.train(&sets.flat_map(|set| ["--set", set]).collect::<Vec<_>>()).ok();
        let line = said.out.lines().find_map(|line| line.strip_prefix("  train on ")).unwrap();
        assert_eq!(line.contains(" --set parallel.tp=1"), refolds, "{line}");
        let arguments: Vec<&str> = line.split_whitespace().skip(1).collect();
        let resumed = place.run(&arguments).ok();
        assert!(resumed.out.contains("resuming after step 2"), "{resumed:?}");
        assert_eq!(place.metrics(run).iter().filter(|line| line.get("loss").is_some()).count(), 4);
    }
}

/// A run begins in a V, and goes on with one stage per rank: bit for bit what it is without either.
#[test]
fn a_schedule_is_chosen_and_changes_no_bit() {
    let place = Place::new();
    let train =
        |arguments: &[&str]| place.train(&[&["--set", "model.num_hidden_layers=4"], arguments].concat());
    train(&["--set", "train.output=plain"]).ok();
    let in_a_v = ["--set", "parallel.schedule=zb-v", "--set", "parallel.vpp=2"];
    let begun = train(&[&in_a_v[..], &["--set", "train.steps=3"]].concat()).ok();
    assert!(begun.out.contains("\nschedule zb-v, layers by stage 0, 3 | 1, 2\n"), "{begun:?}");
    // Held-out tokens in the stages of the run, text in those of the command line.
    let loss = |more: &[&str]| place.run(&[&["eval", "run"], more].concat()).ok().out;
    assert_eq!(loss(&[]), loss(&["--world-size", "4", "--tp", "2", "--pp", "2", "--ep", "2"]));
    let text = ["--text", "text/1.txt", "--sequence-length", "16"];
    assert_eq!(loss(&text), loss(&[&text[..], &["--pp", "1"]].concat()));
    let resumed = train(&["--resume", "--set", "parallel.schedule=GPipe"]).ok();
    assert!(resumed.out.contains("\nschedule gpipe, layers by stage 0-1 | 2-3\n"), "{resumed:?}");
    assert_eq!(place.timeless("run"), place.timeless("plain"));
    place.run(&["diff", "run", "plain"]).ok();

    for (schedule, parts) in [
        ("dual-pipe", &["parallel.schedule = \"dual-pipe\"", "two copies", "dual-pipe-v"][..]),
        ("v-half", &["parallel.vpp = 1", "must be 2 with parallel.schedule = \"v-half\""]),
        ("zbv", &["[parallel] schedule", "is no schedule", "zb-v"]),
    ] {
        let set = format!("parallel.schedule={schedule}");
        train(&["--set", "train.output=other", "--set", &set]).refused(2, parts);
    }
    assert!(!place.path("other").exists());
}

/// Held-out tokens under any folding, and the same as a file of text, which takes another way through the model.
#[test]
fn a_run_is_evaluated_on_tokens_and_on_text() {
    let place = Place::new();
    place.train(&[]).ok();
    let eval = |arguments: &[&str]| place.run(&[&["eval", "run"], arguments].concat());
    let own = eval(&["--batches", "1000"]).ok().out;
    for folding in
        ["--world-size 1", "--world-size 4 --cp 2 --ep 4", "--world-size 6 --pp 2 --etp 1 --tp 1 --vpp 1"]
    {
        let folding: Vec<&str> = folding.split(' ').collect();
        match folding[1] {
            // Four sequences of a batch are not dealt to three ranks.
            "6" => drop(eval(&folding).refused(2, &["global_batch_size", "dp"])),
            _ => assert_eq!(eval(&[&["--batches", "1000"], &folding[..]].concat()).ok().out, own),
        }
    }
    // Whole windows of the held-out stream, whose tokens are bytes.
    let tokens = moe_train::data::TokenFile::open(&place.path("run/data/held_out.tokens")).unwrap();
    let windows = (tokens.len() - 1) / 32;
    let bytes = tokens.tokens(0..windows * 32 + 1).unwrap().into_iter().map(|byte| byte as u8);
    fs::write(place.path("held_out.txt"), bytes.collect::<Vec<u8>>()).unwrap();
    let loss = own.strip_prefix("step 6: validation loss ").unwrap().split(' ').next().unwrap();
    let text = eval(&["--text", "held_out.txt"]).ok().out;
    let want = format!("1 document, {} tokens predicted, loss {loss} nats per token", windows * 32);
    assert!(text.starts_with("windows of 32 tokens, in f64\n") && text.contains(&want), "{text}");
    let folded =
        eval(&["--text", "held_out.txt", "--world-size", "12", "--tp", "2", "--cp", "3", "--ep", "4"]);
    assert_eq!(folded.ok().out, text);
    // A folder of the hub that is made of it knows the context, too; but no held-out tokens, nor does what is made of that.
    place.run(&["export", "run", "out"]).ok();
    let arguments = ["eval", "out", "--text", "held_out.txt", "--tokenizer", "byte"];
    assert_eq!(place.run(&arguments).ok().out, text);
    place.run(&["import", "out", "in"]).ok();
    for folder in ["out", "in"] {
        place.run(&["eval", folder]).refused(2, &["--text is needed", folder]);
    }
}

/// A run on a GPU is evaluated on GPUs, under any folding.
#[test]
fn a_run_on_a_gpu_is_evaluated_on_gpus() {
    let place = Place::new();
    let alone = ["parallel.world_size=1", "parallel.tp=1", "parallel.pp=1", "parallel.ep=1", "train.steps=2"];
    place.train(&alone.iter().flat_map(|set| ["--set", set]).collect::<Vec<_>>()).ok();
    // As if it had been one.
    let manifest = place.path("run/checkpoints/step-2/manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    let body = text.split_once("\"manifest\":").unwrap().1.strip_suffix("}\n").unwrap();
    assert_eq!(body.matches("\"device\":\"cpu\"").count(), 1);
    let body = body.replace("\"device\":\"cpu\"", "\"device\":\"cuda\"");
    let hash = blake3::hash(body.as_bytes());
    fs::write(&manifest, format!("{{\"blake3\":\"{hash}\",\"manifest\":{body}}}\n")).unwrap();
    for folding in ["--world-size 2", "--world-size 2 --tp 2"] {
        let mut command = place.command(&["eval", "run"]);
        let said = command.args(folding.split(' ')).env("CUDA_VISIBLE_DEVICES", "").output().unwrap();
        let said = Said::new(said);
        match cfg!(feature = "cuda") {
            true => assert!([2, 5].contains(&said.status), "{said:?}"),
            false => drop(said.refused(2, &["train.device = \"cuda\"", "--features cuda"])),
        }
    }
    place.run(&["eval", "run", "--batches", "0"]).refused(2, &["train.eval_batches = 0", "at least 1"]);
}

/// From a dense run to experts: the same loss before the first step, then training under another folding.
#[test]
fn a_dense_run_becomes_one_with_experts() {
    let place = Place::new();
    let dense = ["model.first_k_dense_replace=2", "parallel.ep=1", "train.output=dense"];
    let sets = |sets: &[&'static str]| sets.iter().flat_map(|set| ["--set", set]).collect::<Vec<_>>();
    place.train(&[&sets(&dense)[..], &["--set", "train.steps=2"]].concat()).ok();
    // Four experts in halves of the dense width: two copies, both slices of one chosen.
    let granular = ["--set", "model.moe_intermediate_size=4"];
    let upcycle = |more: &[&str]| {
        let command =
            ["checkpoint", "upcycle", "dense", "experts", "--config", "run.toml", "--scaling", "exact"];
        place.run(&[&command[..], &granular, more].concat())
    };
    upcycle(&["--set", "model.num_experts_per_tok=1"])
        .refused(2, &["num_experts_per_tok = 1 must be a multiple of"]);
    upcycle(&["--set", "model.hidden_size=32"]).refused(2, &["hidden_size is 16 in the dense model and 32"]);
    let said = upcycle(&[]).ok();
    assert!(said.out.contains("2 copies of the dense network in 2 slices, outputs times 2.0000"), "{said:?}");
    upcycle(&[]).refused(4, &["experts/step-0 exists already"]);

    let loss = |checkpoint: &str| {
        let tokens = ["--tokens", "dense/data/held_out.tokens"];
        let said = place.run(&[&["eval", checkpoint][..], &tokens].concat()).ok();
        said.out.split_once(": ").unwrap().1.to_owned()
    };
    assert_eq!(loss("experts/step-0"), loss("dense"));

    let init = ["--set", "train.init_checkpoint=experts/step-0"];
    place
        .train(&init)
        .refused(4, &["is of another model", "moe_intermediate_size is 4 there and absent here"]);
    assert!(!place.path("run").exists());
    // In another type than the weights were kept in: rounded.
    let single = ["--set", "train.dtype=f32", "--set", "train.steps=1", "--set", "train.output=single"];
    place.train(&[&granular[..], &init, &single].concat()).ok();
    place
        .train(&[&granular[..], &single, &["--set", "train.dtype=f64", "--resume"]].concat())
        .refused(2, &["train.dtype was f32 when the checkpoint was written and is f64 now"]);
    let folding = ["--set", "parallel.tp=1", "--set", "parallel.ep=1", "--set", "parallel.etp=2"];
    let said = place.train(&[&granular[..], &init, &folding, &["--set", "train.steps=2"]].concat()).ok();
    assert!(said.out.contains("starting from the weights of experts/step-0"), "{said:?}");
    place.train(&[&granular[..], &["--resume"]].concat()).ok();
    let steps: Vec<Value> =
        place.metrics("run").into_iter().filter(|line| line.get("loss").is_some()).collect();
    assert_eq!(steps.len(), 6);
    place.run(&["sample", "experts/step-0", "--prompt", "a "]).ok();
}

/// A run of more steps than anybody waits for, some steps after its start.
fn endless(place: &Place) -> Child {
    let mut command = place.command(&["train", "run.toml", "--set", "train.steps=10000000"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    let lines = || fs::read_to_string(place.path("run/metrics.jsonl")).unwrap_or_default().lines().count();
    while lines() < 8 {
        assert!(start.elapsed() < Duration::from_secs(60), "the run does not start");
        thread::sleep(Duration::from_millis(5));
    }
    child
}

#[track_caller]
fn assert_same_metrics(place: &Place) {
    let (run, whole) = (place.timeless("run"), place.timeless("whole"));
    for (line, other) in run.iter().zip(&whole) {
        assert_eq!(line, other);
    }
    assert_eq!(run.len(), whole.len());
}

/// Goes on to `last`, and comes to the metrics of a run that nothing happened to.
fn goes_on_as_if_nothing_had_happened(place: &Place, last: u64) {
    let last = format!("train.steps={last}");
    place.train(&["--resume", "--set", &last]).ok();
    place.train(&["--set", &last, "--set", "train.output=whole"]).ok();
    assert_same_metrics(place);
    place.run(&["checkpoint", "verify", "run"]).ok();

    // Once more: there is nothing left to do.
    place.train(&["--resume", "--set", &last]).ok();
    assert_same_metrics(place);
}

#[test]
fn a_killed_run_goes_on_from_its_last_checkpoint() {
    let place = Place::new();
    let mut child = endless(&place);
    child.kill().unwrap();
    child.wait().unwrap();
    let newest = place.run(&["checkpoint", "ls", "run"]).ok();
    let newest =
        newest.out.lines().last().unwrap().split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
    goes_on_as_if_nothing_had_happened(&place, newest + 3);
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_and_goes_on() {
    let place = Place::new();
    let child = endless(&place);
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let said =
        Said::new(child.wait_with_output().unwrap()).refused(130, &["interrupted after step ", "--resume"]);
    let message = said.err.split("interrupted after step ").nth(1).unwrap();
    let step: u64 = message.split(';').next().unwrap().parse().unwrap();
    assert!(message.contains(&format!("run/checkpoints/step-{step}: ")), "{message}");
    place.run(&["checkpoint", "verify", "run"]).ok();
    goes_on_as_if_nothing_had_happened(&place, step + 3);
}

/// Traces of a checkpoint under two foldings are the same to rounding, and those of two checkpoints are not.
#[test]
fn traces_of_checkpoints_are_compared() {
    let place = Place::new();
    place.train(&[]).ok();
    let ids: Vec<u8> = (0..2 * 7i64).flat_map(|i| (i * i % 256).to_le_bytes()).collect();
    let ids = safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![2, 7], &ids).unwrap();
    safetensors::serialize_to_file([("input_ids", ids)], None, &place.path("ids.safetensors")).unwrap();
    let trace = |checkpoint: &str, out: &str, folding: &[&str]| {
        let fixed =
            ["trace", "--checkpoint", checkpoint, "--tokens", "ids.safetensors", "--out", out, "--grads"];
        place.run(&[&fixed, folding].concat())
    };
    let folding = ["--world-size", "8", "--tp", "2", "--cp", "2", "--pp", "2", "--ep", "2"];
    let said = trace("run", "one", &[]).ok();
    assert!(said.out.starts_with("loss "), "{said:?}");
    trace(
        "run",
        "eight",
        &[&folding[..], &["--dispatcher", "all-gather", "--recompute", "moe_act,core_attn"]].concat(),
    )
    .ok();
    trace("run/checkpoints/step-4", "before", &["--pp", "2", "--world-size", "2"]).ok();
    trace("run", "single", &["--dtype", "f32"]).ok();

    place.run(&["diff", "one", "one"]).ok();
    let said = place.run(&["diff", "one", "eight", "--tolerance", "1e-10"]).ok();
    assert!(said.out.contains("grad.model.layers.1.mlp.experts.gate_up_proj"), "{said:?}");
    place.run(&["diff", "one", "single", "--tolerance", "1e-4"]).ok();
    place.run(&["diff", "one", "single", "--tolerance", "1e-9"]).refused(1, &["tensors differ"]);
    place.run(&["diff", "one", "before", "--limit", "3"]).refused(1, &["tensors differ"]);
    place.run(&["diff", "run", "run/checkpoints/step-6"]).ok();
    let said = place
        .run(&["diff", "run", "run/checkpoints/step-4", "--limit", "999"])
        .refused(1, &["tensors differ"]);
    assert!(said.out.contains("lm_head.weight (v)"), "{said:?}");

    place.run(&["diff", "one", "nothing"]).refused(4, &["there is no nothing"]);
    assert_eq!(place.run(&["diff", "one", "one", "--tolerance", "-1"]).status, 2);
    trace("run", "none", &["--tp", "3", "--world-size", "3"]).refused(2, &["num_attention_heads"]);
    trace("nothing", "none", &[]).refused(4, &["nothing"]);
    place
        .run(&["trace", "--checkpoint", "run", "--tokens", "run.toml", "--out", "none"])
        .refused(3, &["run.toml"]);
    assert!(!place.path("none").exists());
}

#[cfg(feature = "tokenizers")]
#[test]
fn a_tokenizer_goes_with_its_run() {
    let place = Place::new();
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer");
    fs::create_dir(place.path("hub")).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(Path::new(fixture).join(name), place.path("hub").join(name)).unwrap();
    }
    let settings = ["--set", "data.tokenizer='hub'", "--set", "train.steps=2"];
    // 382 tokens; nothing is written before that is known.
    let small = place.train(&settings).refused(2, &["model.vocab_size = 256", "at least 382", "hub"]);
    assert!(!small.out.contains("tokens to train on") && !place.path("run").exists());
    let settings = [&settings[..], &["--set", "model.vocab_size=384"]].concat();
    let missing = [&settings[..], &["--set", "data.eos_token='</s>'"]].concat();
    place.train(&missing).refused(3, &["has no token \"</s>\"", "data.eos_token"]);
    let said = place.train(&settings).ok();
    assert!(said.out.contains("documents end with <|endoftext|> (1)"), "{said:?}");
    assert!(said.out.contains("nats/token") && !said.out.contains("<|begin|>"), "{said:?}");
    let written = || fs::read_to_string(place.path("run/config.toml")).unwrap();
    assert!(written().contains("eos_token = \"<|endoftext|>\"\n"), "{}", written());

    let tokens = moe_train::data::TokenFile::open(&place.path("run/data/train.tokens")).unwrap();
    assert_eq!(tokens.vocab_size(), 382);
    for i in 0..tokens.documents() {
        let document = tokens.tokens(tokens.document(i).unwrap()).unwrap();
        assert_eq!((document[0], document.last()), (0, Some(&1)));
    }
    // Another run from its weights has a tokenizer of its own, and not that which came with them.
    fs::create_dir(place.path("other")).unwrap();
    let text = fs::read_to_string(place.path("hub/tokenizer.json")).unwrap().replace("<|pad|>", "<|fill|>");
    fs::write(place.path("other/tokenizer.json"), &text).unwrap();
    let own = ["train.init_checkpoint='run'", "train.output='second'", "data.tokenizer='other'"];
    let own: Vec<&str> = own.into_iter().flat_map(|setting| ["--set", setting]).collect();
    place.train(&[&settings[..], &own].concat()).ok();
    // Not `assert_eq`, which would print both.
    assert!(fs::read_to_string(place.path("second/hub/tokenizer.json")).unwrap() == text);
    // The run needs the original no more, and is continued with no other.
    fs::remove_dir_all(place.path("hub")).unwrap();
    let sampled = place.run(&["sample", "run", "--prompt", "experts", "--tokens", "2"]).ok();
    assert!(sampled.out.starts_with("experts"), "{sampled:?}");
    let more = [&settings[..], &["--set", "train.steps=3", "--resume"]].concat();
    place.train(&more).ok();
    let other = [&more[..], &["--set", "data.tokenizer='byte'"]].concat();
    place.train(&other).refused(2, &["data.tokenizer was hub", "is byte now"]);
    assert!(written().contains("eos_token = \"<|endoftext|>\"\n"), "{}", written());
    let other = [&more[..], &["--set", "data.eos_token=380"]].concat();
    place.train(&other).refused(2, &["data.eos_token was \"<|endoftext|>\"", "is 380 now"]);
}

/// The tokens of a blend are of a tokenizer that is named, and of an end that may not be known.
#[cfg(feature = "tokenizers")]
#[test]
fn a_run_on_a_blend_continues_a_text() {
    let place = Place::new();
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer/tokenizer.json");
    let text = fs::read_to_string(fixture).unwrap();
    fs::write(place.path("tokenizer.json"), text.replace("<|pad|>", "</s>")).unwrap();
    let train = |sets: &[&str]| {
        let shared = ["data.tokenizer='tokenizer.json'", "model.vocab_size=384", "train.steps=2"];
        let sets = shared.iter().chain(sets).flat_map(|set| ["--set", set]);
        place.train(&sets.collect::<Vec<_>>())
    };
    train(&[]).refused(3, &["has several: <|endoftext|>, </s>", "data.eos_token"]);
    let said = train(&["train.output='text'", "data.eos_token='</s>'"]).ok();
    assert!(said.out.contains("another prompt") && said.err.matches("warning").count() == 0, "{said:?}");

    let blend = ["data.files=[]", "data.blend=[{ path = 'text/data/train.tokens' }]"];
    let said = train(&blend).ok();
    assert!(said.out.contains("\nThe ") && said.out.contains("another prompt"), "{said:?}");
    let unknown = "warning: it is not known which token ended the documents of the run: the tokenizer has several: \
                   <|endoftext|>, </s>; a text ends before it if --stop names it\n";
    assert!(said.err.contains(unknown), "{said:?}");
    let sample = |more: &[&str]| place.run(&[&["sample", "run", "--tokens", "2"], more].concat()).ok().err;
    assert_eq!((sample(&[]), sample(&["--stop", "none"])), (unknown.to_owned(), String::new()));
    let known = [&blend[..], &["train.output='known'", "data.eos_token='</s>'"]].concat();
    assert!(!train(&known).ok().err.contains("warning"));
    let other = place.run(&["sample", "known", "--tokens", "2", "--tokenizer", "byte"]).ok();
    assert!(other.err.contains("the tokenizer has no token \"</s>\""), "{other:?}");
}

#[cfg(not(feature = "tokenizers"))]
#[test]
fn without_the_feature_a_tokenizer_is_refused_by_name() {
    let place = Place::new();
    place
        .train(&["--set", "data.tokenizer='tokenizer.json'"])
        .refused(3, &["tokenizer.json", "built without the feature `tokenizers`"]);
}
