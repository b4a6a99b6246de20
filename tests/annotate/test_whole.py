"""Times: what a file declares, what its packets say, and what is refused because neither can be trusted."""

import av
import numpy as np
import pytest

from fw_pipeline.annotate.types import VideoSetAside
from fw_pipeline.annotate.video import decode
from fw_pipeline.annotate.whole import fills_its_file
from tests.helpers.made_videos import pan, write


def refusal(path) -> str:
    with pytest.raises(VideoSetAside) as caught:
        list(decode(path))
    return str(caught.value)


def remux(source, target, change) -> None:
    """Copy the packets of `source`, each as `change(index, packet)` leaves it; None drops it."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        track = new.add_stream_from_template(old.streams.video[0])
        for index, packet in enumerate(old.demux(old.streams.video[0])):
            if packet.size and (packet := change(index, packet)):
                packet.stream = track
                new.mux(packet)


def order_of(frames, pictures) -> list[int]:
    return [int(np.argmin([np.abs(frame.rgb().astype(int) - picture).mean() for picture in pictures])) for frame in frames]


def stay(seconds):
    def change(index, packet):
        if index == 23:
            packet.duration = int(seconds / packet.time_base)
        return packet

    return change


@pytest.mark.parametrize("seconds", [0.2, 3, 40])
@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_a_last_frame_that_stays_long_is_not_a_truncated_file(tmp_path, name, seconds) -> None:
    codec = "libx264" if name == "a.mkv" else "libvpx-vp9"
    source = write(tmp_path / f"source{name[1:]}", pan(24), codec=codec, encoder={"bf": "0"} if codec == "libx264" else {})
    remux(source, tmp_path / name, stay(seconds))
    assert len(list(decode(tmp_path / name))) == 24


def test_a_whole_matroska_file_is_known_by_its_bytes(tmp_path) -> None:
    video = write(tmp_path / "a.mkv", pan(72))
    whole = video.read_bytes()
    assert fills_its_file(video)
    for spoilt in (whole[: len(whole) // 2], whole[:-1], whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)):
        video.write_bytes(spoilt)
        assert not fills_its_file(video)
        if len(spoilt) < len(whole) - 1 or not spoilt[-1]:
            assert refusal(video).startswith(("a.mkv: truncated", "a.mkv: damaged"))


@pytest.mark.parametrize(("codec", "reordered"), [("libx264", 3), ("mpeg4", 2), ("mpeg4", 0)])
def test_reordered_frames_of_an_avi_come_out_in_their_order_and_at_their_times(tmp_path, codec, reordered) -> None:
    # An AVI stores no presentation times; the frames a demuxer gives carry guesses that go back and forth.
    frames = pan(30)
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream(codec, rate=24, options={"bf": str(reordered), "crf": "8", "x264-params": "b-adapt=0"})
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 48, 96, "yuv420p", 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    found = list(decode(tmp_path / "a.avi"))
    assert order_of(found, frames) == list(range(30))
    np.testing.assert_allclose(np.diff([frame.time for frame in found]), 1 / 24, atol=1e-6)
    later = list(decode(tmp_path / "a.avi", start=1.0))
    assert {frame.time for frame in later} <= {frame.time for frame in found}
    assert order_of(later, frames) == [[frame.time for frame in found].index(frame.time) for frame in later]


def test_an_avi_whose_frames_and_packets_do_not_pair_up_is_refused(tmp_path) -> None:
    frames = pan(30)
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=24, options={"bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 96, "yuv420p"
        packets = [p for frame in frames for p in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))]
        for index, packet in enumerate([*packets, *stream.encode()]):
            if index == 9:  # a packet of a frame that was not coded: the decoder gives nothing for it
                packet = not_coded(packet)
            container.mux(packet)
    assert "a.avi: frames out of order: an AVI of 30 packets and 29 frames" in refusal(tmp_path / "a.avi")


def not_coded(packet: av.Packet) -> av.Packet:
    """In its place a picture marked as not coded: vop_coded is 0."""
    other = av.Packet(bytes([0, 0, 1, 0xB6, 0b01010000, 0b11001111]))
    other.pts, other.dts, other.duration, other.time_base, other.stream = (
        *(packet.pts, packet.dts, packet.duration, packet.time_base),
        packet.stream,
    )
    return other


@pytest.mark.parametrize(("late", "said"), [(5, "frames out of order"), (5000 * 24, "times cannot be trusted")])
def test_times_that_go_back_or_leap_are_refused_by_name(tmp_path, late, said) -> None:
    source = write(tmp_path / "source.mkv", pan(30), encoder={"bf": "0"}, gop=1)

    def change(index, packet):
        if said == "frames out of order":  # the packets' own order is kept, as the muxer asks: two frames change their times
            packet.pts = packet.pts + (42 * 3 if index == 10 else 0)
        elif index >= 15:
            packet.pts, packet.dts = (time + int(5000 / packet.time_base) for time in (packet.pts, packet.dts))
        return packet

    remux(source, tmp_path / "a.mkv", change)
    assert said in refusal(tmp_path / "a.mkv")


def test_the_clock_of_a_video_may_start_anywhere(tmp_path) -> None:
    times = 1000 + np.arange(20) / 24
    found = [frame.time for frame in decode(write(tmp_path / "a.mkv", pan(20), times))]
    np.testing.assert_allclose(np.diff(found), 1 / 24, atol=2e-3)
