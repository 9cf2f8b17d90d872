//! Buffers, views and the allocator.

use super::host::Random;
use crate::{Device, Error, Tensor};

/// Allocation, copies, ranges, counters, and [`Tensor`] over them.
pub fn memory<D: Device>(device: &D) {
    let bytes: Vec<u8> = Random::new(1).ints(1003, 256).into_iter().map(|x| x as u8).collect();
    let live = device.memory().live;
    device.reset_peak();
    {
        let mut a = device.alloc(1003).expect("1003 bytes");
        let mut b = device.alloc(2000).expect("2000 bytes");
        assert_eq!((D::byte_len(&a), D::byte_len(&b)), (1003, 2000));
        assert_eq!(device.memory().live, live + 3003, "live counts the bytes asked for");
        device.upload(&mut a, 0, &bytes).expect("upload");
        device.zero(&mut a, 10..13).expect("zero");
        device.zero(&mut b, 0..2000).expect("zero");
        device.copy(&mut b, 7, &a, 3..1003).expect("copy");
        let mut host = vec![1u8; 1010];
        device.download(&b, 0, &mut host).expect("download");
        let mut want = vec![0u8; 1010];
        want[7..1007].copy_from_slice(&bytes[3..]);
        want[14..17].fill(0);
        assert_eq!(host, want);

        let len = 1003;
        let outside = Err(Error::OutOfBounds { start: 1000, end: 1004, len });
        assert_eq!(device.zero(&mut a, 1000..1004), outside);
        assert_eq!(device.upload(&mut a, 1000, &[0; 4]), outside);
        assert_eq!(device.download(&a, 1000, &mut [0; 4]), outside);
        assert_eq!(device.copy(&mut b, 0, &a, 1000..1004), outside);
        let beyond = Err(Error::OutOfBounds { start: 1999, end: 2003, len: 2000 });
        assert_eq!(device.copy(&mut b, 1999, &a, 0..4), beyond);
    }
    assert_eq!(device.memory().live, live, "dropping frees");
    assert!(device.memory().peak >= live + 3003, "the peak stays");
    device.reset_peak();
    assert_eq!(device.memory().peak, live);

    assert_eq!(D::byte_len(&device.alloc(0).expect("nothing")), 0);
    for _ in 0..2 {
        // Fresh memory the first time, and what is not 0 any more, perhaps, the second time.
        let mut zeros = Tensor::<f64, D>::zeros(device, 3, 5).expect("zeros");
        assert_eq!(zeros.to_vec(device).expect("download"), [0.0; 15]);
        let buf = zeros.view_mut().expect("exclusive");
        device.upload({ buf }.buf(), 8, bytemuck::bytes_of(&1.0f64)).expect("upload");
    }

    let values: Vec<i32> = (0..12).collect();
    let mut t = Tensor::from_slice(device, 3, 4, &values).expect("tensor");
    let part = t.rows(1..3).and_then(|t| t.columns(1..3)).expect("part");
    assert_eq!(part.to_vec(device).expect("download"), [5, 6, 9, 10]);
    assert!(matches!(t.view_mut(), Err(Error::Shared { holders: 2 })));
    drop(part);
    assert!(t.view_mut().is_ok());
}
