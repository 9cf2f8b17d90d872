//! Views and tensors: slices, shapes, sharing.

use half::bf16;
use moe_kernels::{Cpu, Device, Error, Float, Layout, Result, Tensor, View, ViewMut};

fn counting(cpu: &Cpu, rows: usize, cols: usize) -> Result<Tensor<i64, Cpu>> {
    let elements: Vec<i64> = (0..(rows * cols) as i64).collect();
    Tensor::from_slice(cpu, rows, cols, &elements)
}

#[test]
fn slices_of_slices() -> Result<()> {
    let cpu = Cpu::poisoned(1);
    let t = counting(&cpu, 4, 5)?;
    let part = t.rows(1..4)?.columns(2..4)?;
    assert_eq!(part.to_vec(&cpu)?, [7, 8, 12, 13, 17, 18]);
    assert_eq!(part.rows(1..2)?.columns(1..2)?.to_vec(&cpu)?, [13]);
    assert_eq!(part.byte_range(), 56..152);
    assert_eq!(part.view().rows(2..3)?.layout(), Layout { offset: 17, rows: 1, cols: 2, stride: 5 });
    assert_eq!(part.rows(3..3)?.to_vec(&cpu)?, []);
    assert_eq!(part.columns(2..2)?.to_vec(&cpu)?, []);
    Ok(())
}

#[test]
fn only_contiguous_matrices_take_another_shape() -> Result<()> {
    let cpu = Cpu::poisoned(1);
    let t = counting(&cpu, 4, 6)?;
    assert_eq!(t.rows(1..3)?.reshape(3, 4)?.rows(1..2)?.to_vec(&cpu)?, [10, 11, 12, 13]);
    assert!(matches!(t.reshape(5, 5), Err(Error::Shape { expected: [4, 6], got: [5, 5], .. })));
    assert!(matches!(t.columns(0..3)?.reshape(3, 4), Err(Error::Shape { .. })));
    // One row is contiguous however far the next would be.
    assert_eq!(t.columns(1..5)?.rows(2..3)?.reshape(2, 2)?.to_vec(&cpu)?, [13, 14, 15, 16]);
    Ok(())
}

#[test]
fn nothing_reaches_outside() -> Result<()> {
    let cpu = Cpu::poisoned(1);
    let t = counting(&cpu, 3, 4)?;
    let outside = |start, end, len| Some(Error::OutOfBounds { start, end, len });
    assert_eq!(t.rows(2..4).err(), outside(2, 4, 3));
    assert_eq!(t.columns(4..5).err(), outside(4, 5, 4));
    #[allow(clippy::reversed_empty_ranges)] // what is refused
    let reversed = t.rows(2..1).err();
    assert_eq!(reversed, outside(2, 1, 3));
    let mut buf = cpu.alloc(64)?;
    let beyond = Layout { offset: 1, rows: 2, cols: 4, stride: 4 };
    assert_eq!(View::<i64, Cpu>::new(&buf, beyond).err(), outside(8, 72, 64));
    // What no `usize` counts: 2^64 elements, a row of them, where they start, and how many bytes they are.
    let far = 1 << 32;
    for layout in [
        Layout { offset: 0, rows: far, cols: far, stride: far },
        Layout { offset: 0, rows: 2, cols: 1, stride: usize::MAX },
        Layout { offset: usize::MAX, rows: 1, cols: 1, stride: 1 },
        Layout { offset: 0, rows: 1, cols: 1 << 61, stride: 1 << 61 },
    ] {
        let refused = |result: Option<Error>| matches!(result, Some(Error::OutOfBounds { .. }));
        assert!(refused(View::<i64, Cpu>::new(&buf, layout).err()), "{layout:?}");
        assert!(refused(ViewMut::<i64, Cpu>::new(&mut buf, layout).err()), "{layout:?}");
    }
    for (rows, cols) in [(far, far), (1, 1 << 61)] {
        for tensor in [Tensor::<i64, Cpu>::uninit(&cpu, rows, cols), Tensor::zeros(&cpu, rows, cols)] {
            assert!(matches!(tensor, Err(Error::OutOfMemory { .. })), "{rows} x {cols}");
        }
    }
    assert!(matches!(Tensor::<i64, Cpu>::from_slice(&cpu, far, far, &[]), Err(Error::Shape { .. })));
    assert!(matches!(t.rows(0..0)?.reshape(far, far), Err(Error::Shape { .. })));
    let overlapping = Layout { offset: 0, rows: 2, cols: 4, stride: 3 };
    assert!(ViewMut::<i64, Cpu>::new(&mut buf, overlapping).is_err());
    assert!(Tensor::<i64, Cpu>::from_slice(&cpu, 2, 3, &[0; 5]).is_err());
    Ok(())
}

#[test]
fn shared_memory_is_not_written() -> Result<()> {
    let cpu = Cpu::poisoned(1);
    let mut t = counting(&cpu, 2, 3)?;
    let lent = t.buf().clone();
    assert_eq!(t.view_mut().err(), Some(Error::Shared { holders: 2 }));
    let same = Tensor::<i64, Cpu>::from_buf(lent, Layout { offset: 3, rows: 1, cols: 3, stride: 3 })?;
    assert_eq!(same.to_vec(&cpu)?, [3, 4, 5]);
    drop(same);
    t.view_mut()?.buf().as_mut_slice::<i64>()[4] = 40;
    assert_eq!(t.to_vec(&cpu)?, [0, 1, 2, 3, 40, 5]);
    Ok(())
}

#[test]
fn elements_round_once() -> Result<()> {
    let cpu = Cpu::poisoned(1);
    // bfloat16 has 8 significant bits, ties to even.
    let t = Tensor::<bf16, Cpu>::from_f64(&cpu, 1, 3, &[1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0])?;
    assert_eq!(t.to_f64(&cpu)?, [1.0, 1.0, 1.0 + 4.0 / 256.0]);
    assert_eq!(bf16::from_acc(0.3f32).to_acc(), 0.30078125);
    assert_eq!(f32::from_f64(0.1).to_f64(), 0.1f32 as f64);
    Ok(())
}
