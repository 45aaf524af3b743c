"""All pipelines that make videos."""

from . import video_conditioned, video_hunyuan, video_ltx, video_ltx2, video_new, video_others, video_wan

CASES = [
    *video_wan.CASES,
    *video_ltx.CASES,
    *video_hunyuan.CASES,
    *video_ltx2.CASES,
    *video_others.CASES,
    *video_new.CASES,
    *video_conditioned.CASES,
]
