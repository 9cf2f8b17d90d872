//! Gradients begin in memory that holds anything: what is added first is written, and what nothing is added to is 0.

use moe_comm::{Comms, SoloWorld};
use moe_kernels::family::Op;
use moe_kernels::{Cpu, Tensor};
use moe_model::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, ParamStore, Placed};
use moe_topology::{Attention, Folding, Mapping, Owner, Placement};

type Matrix = Tensor<f64, Cpu>;

fn matrix(device: &Cpu, rows: usize, cols: usize, values: &[f64]) -> Matrix {
    Tensor::from_slice(device, rows, cols, values).unwrap()
}

#[test]
fn what_is_added_first_is_written_and_the_rest_is_zero() {
    let device = Cpu::poisoned(1);
    let folding = Folding::new(Mapping::default()).unwrap();
    let mut params = ParamLayoutBuilder::new(&folding, 0);
    let mut add = |name: &str, dims: &[usize]| {
        let placement = Placement::new(dims, &[], Attention::DP, Owner::Stage(0)).unwrap();
        let (name, placement) = (Name::One(name.into()), Placed::Attention(placement));
        params.add(&[Logical { name, placement, init: Init::Ones }]).unwrap()
    };
    let ids = [add("product", &[2, 3]), add("sum", &[5]), add("grouped", &[4, 1]), add("nothing", &[2, 2])];
    let mut params = ParamStore::<f64, Cpu>::new(params.build(), 0, &device).unwrap();
    let comms =
        Comms::builder().attention(Attention::DP).build(&SoloWorld::new(device.clone()), &device, &folding);
    let comms = comms.unwrap();
    // dyᵀ · x over one row.
    let (dy, x) = (matrix(&device, 1, 2, &[2.0, -1.0]), matrix(&device, 1, 3, &[1.0, 3.0, 5.0]));
    // Two groups of two rows of weights each; the first has no tokens.
    let (d_rows, rows) = (matrix(&device, 2, 2, &[1.0, 2.0, 3.0, 4.0]), matrix(&device, 2, 1, &[10.0, 20.0]));
    let offsets = Tensor::<i32, Cpu>::from_slice(&device, 1, 3, &[0, 0, 2]).unwrap();
    let [product, sum, grouped, _] = ids;

    // The second step begins from 0 again.
    for step in 1..=2 {
        params.zero_grads(false);
        let micro_batches = step;
        for _ in 0..micro_batches {
            params.add_product(product, dy.view(), Op::T, x.view(), Op::N).unwrap();
            params.add_grouped_product(grouped, d_rows.view(), rows.view(), offsets.view()).unwrap();
        }
        // What only adds finds zeros.
        let found = |params: &mut ParamStore<f64, Cpu>, id: ParamId| {
            let grad = params.grad(id).unwrap();
            Tensor::<f64, Cpu>::to_vec(&copied(&device, grad.as_view()), &device).unwrap()
        };
        assert_eq!(found(&mut params, sum), [0.0; 5]);
        params.start_reductions(&comms).unwrap();
        let n = f64::from(micro_batches);
        for bucket in 0..params.buckets().len() {
            let grads = params.reduced(bucket).unwrap().to_vec(&device).unwrap();
            let mut expected = vec![0.0; grads.len()];
            for part in &params.buckets()[bucket].parts {
                let values: &[f64] = match part.name.as_str() {
                    "product" => &[2.0, 6.0, 10.0, -1.0, -3.0, -5.0],
                    "grouped" => &[0.0, 0.0, 70.0, 100.0],
                    _ => continue,
                };
                for (at, value) in part.range().zip(values) {
                    expected[at] = n * value;
                }
            }
            assert_eq!(grads, expected, "step {step}");
        }
    }
}

fn copied(device: &Cpu, view: moe_kernels::View<'_, f64, Cpu>) -> Matrix {
    use moe_kernels::family::Rows;
    let [rows, cols] = view.shape();
    let mut copy = Matrix::uninit(device, rows, cols).unwrap();
    device.copy_rows(copy.view_mut().unwrap(), view).unwrap();
    copy
}
