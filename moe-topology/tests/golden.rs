//! The lists that Megatron-Core itself builds, and what it refuses.

use moe_topology::{Attention, Constraints, Error, Expert, Folding, Mapping, Rule, draw, megatron};
use serde_json::Value;

fn fixture(text: &str) -> serde_json::Map<String, Value> {
    serde_json::from_str(text).unwrap()
}

fn mapping(value: &Value, etp_default: usize) -> Mapping {
    let size = |name: &str, default: usize| value[name].as_u64().map_or(default, |size| size as usize);
    let tp = size("tp", 1);
    let mapping = Mapping {
        world_size: size("world", 0),
        tp,
        cp: size("cp", 1),
        pp: size("pp", 1),
        ep: size("ep", 1),
        etp: size("etp", etp_default),
        order: value["order"].as_str().unwrap_or("tp-cp-ep-dp-pp").parse().unwrap(),
        ..Mapping::default()
    };
    match size("dist_opt_instances", 1) {
        1 => mapping,
        instances => mapping.optimizer_instances(instances),
    }
}

#[test]
fn all_named_groups_equal_the_references() {
    let cases = fixture(include_str!("fixtures/folding_golden.json"));
    assert_eq!(cases.len(), 23);
    for (name, case) in cases {
        let folding = Folding::new(mapping(&case["mapping"], 1)).unwrap();
        let groups: Vec<_> = megatron::groups(&folding).collect();
        assert_eq!(groups.len(), case["groups"].as_object().unwrap().len());
        for (group, lists) in groups {
            assert_eq!(serde_json::to_value(lists).unwrap(), case["groups"][group], "{name}: {group}");
        }
    }
}

#[test]
fn json_lists_equal_the_references() {
    for (name, case) in fixture(include_str!("fixtures/folding_golden.json")) {
        let folding = Folding::new(mapping(&case["mapping"], 1)).unwrap();
        let json: Value = serde_json::from_str(&draw::json(&folding)).unwrap();
        assert_eq!(json["world_size"], case["mapping"]["world"]);
        assert_eq!(json["order"], case["mapping"]["order"]);
        let attention = ["tp", "cp", "dp", "pp", "tp-cp", "dp-cp", "tp-pp"];
        let theirs = ["tp", "cp", "dp", "pp", "tp_cp", "dp_cp", "mp"];
        for (ours, theirs) in attention.into_iter().zip(theirs) {
            assert_eq!(json["attention"][ours], case["groups"][theirs], "{name}: {ours}");
        }
        let moe = ["etp", "ep", "edp", "pp", "etp-ep", "etp-ep-pp"];
        let theirs = ["expt_tp", "ep", "expt_dp", "pp", "tp_ep", "tp_ep_pp"];
        for (ours, theirs) in moe.into_iter().zip(theirs) {
            assert_eq!(json["moe"][ours], case["groups"][theirs], "{name}: {ours}");
        }
        // Beside these, only the digits of axes that have two.
        let others = |view: &str, names: &[&str]| -> Vec<String> {
            let all = json[view].as_object().unwrap().keys();
            all.filter(|name| !names.contains(&name.as_str())).cloned().collect()
        };
        let digits = |sizes: [usize; 2], axis: &str| match sizes.contains(&1) {
            true => Vec::new(),
            false => vec![format!("{axis}.inner"), format!("{axis}.outer")],
        };
        let dp = [Attention::DP_INNER, Attention::DP_OUTER].map(|digit| folding.size(digit));
        let edp = [Expert::EDP_INNER, Expert::EDP_OUTER].map(|digit| folding.size(digit));
        assert_eq!(others("attention", &attention), digits(dp, "dp"), "{name}");
        assert_eq!(others("moe", &moe), digits(edp, "edp"), "{name}");
    }
}

#[test]
fn what_the_reference_refuses_is_refused_for_the_same_reason() {
    let cases = fixture(include_str!("fixtures/folding_illegal.json"));
    assert_eq!(cases.len(), 11);
    for (name, case) in cases {
        let asked = &case["kw"];
        // Where ETP is not given, the reference takes TP.
        let mapping = mapping(asked, asked["tp"].as_u64().unwrap_or(1) as usize);
        let constraints = Constraints {
            vpp: asked["vpp"].as_u64().unwrap_or(1) as usize,
            num_experts: asked["num_experts"].as_u64().map(|experts| experts as usize),
            ..Constraints::default()
        };
        let Err(Error::Illegal { rule, nearest }) = constraints.fold(mapping.clone()) else {
            panic!("{name} is legal")
        };
        let (rule, text) = (rule.to_string(), format!("{rule:?}"));
        let expected = match name.as_str() {
            "world_not_div_attention" => {
                "world_size must be a multiple of tp·cp·pp, but 16 % (3·1·1 = 3) = 1"
            }
            "world_not_div_expert" => "world_size must be a multiple of etp·ep·pp, but 8 % (1·3·1 = 3) = 2",
            "etp_default_inherits_tp" => {
                "world_size must be a multiple of etp·ep·pp, but 8 % (8·8·1 = 64) = 8"
            }
            "pp_too_big" => "world_size must be a multiple of tp·cp·pp, but 8 % (1·1·16 = 16) = 8",
            "dplast_fold_edp_ne_dp" => {
                "the pipeline groups of both views must be the same, which with order tp-cp-ep-pp-dp needs \
                 tp·cp = etp·ep, but tp·cp = 2·1 = 2 and etp·ep = 1·4 = 4"
            }
            "pp_first_fold" => {
                "the pipeline groups of both views must be the same, which with order tp-pp-cp-ep-dp needs \
                 tp = etp, but tp = 2 and etp = 1"
            }
            "pp_group_mismatch_same_edp" => {
                "the pipeline groups of both views must be the same, which with order tp-cp-pp-ep-dp needs \
                 tp·cp = etp, but tp·cp = 2·2 = 4 and etp = 2"
            }
            "axis_missing_from_order" => "order tp-ep-dp-pp leaves out cp, which then must be 1, but is 2",
            "vpp_without_pp" => "vpp > 1 (interleaved stages) needs pp > 1, but vpp = 2 and pp = 1",
            "distopt_instances_edp" => "edp must be a multiple of its outer digit, but 1 % 2 = 1",
            "experts_not_div_ep" => "num_experts must be a multiple of ep, but 12 % 8 = 4",
            _ => panic!("no expectation for {name}"),
        };
        assert_eq!(rule, expected, "{name}: {text}");
        assert!(!nearest.legal.is_empty(), "{name}");
        for mapping in nearest.legal {
            constraints.fold(mapping).unwrap();
        }
    }
}

/// The one deliberate difference: an ETP that is not given is 1.
#[test]
fn etp_is_one_unless_given() {
    let folding = Folding::new(Mapping { world_size: 8, tp: 8, ep: 8, ..Mapping::default() }).unwrap();
    assert_eq!(folding.mapping().etp, 1);
    let inherited = Mapping { etp: 8, ..folding.mapping().clone() };
    assert!(matches!(
        Folding::new(inherited),
        Err(Error::Illegal { rule: Rule::Multiple { name: "world_size", value: 8, .. }, .. })
    ));
}
