"""Signs of the drawn world in Chinese: geometry, colours and shapes as signs'.

Words are two to four characters, each in one cell. They are not set apart by
spaces, so a held-out word must not stand anywhere in a line of training.
"""

import functools

from xomni_jax.data import world_paint
from xomni_jax.data.world_signs import SIZE, Sign, boxes, kind, paint
from xomni_jax.data.world_words import Picks, word_split

__all__ = [
  "LANG",
  "SIZE",
  "boxes",
  "caption",
  "draw",
  "kind",
  "misspelt",
  "paint",
  "prompt",
  "questions",
  "words",
]

LANG = "zh"
# Written for xomni_jax, as words.txt.
_WORDS = """
欢迎 光临 出口 入口 安全 小心 停车 图书 咖啡 茶馆 书店 学校 医院 公园 花园 火车
地铁 机场 银行 邮局 超市 面包 水果 牛奶 米饭 面条 饺子 热水 冷水 电梯 楼梯 上午
下午 今天 明天 早晨 夜晚 春天 夏天 秋天 冬天 音乐 电影 舞蹈 绘画 体育 足球 篮球
游泳 跑步 长城 北京 上海 大海 高山 河流 森林 草原 蓝天 白云 阳光 月亮 星星 小猫
小狗 金鱼 熊猫 老虎 大象 白马 黄牛 绵羊 兔子 乌龟 青蛙 蝴蝶 蜜蜂 飞鸟 苹果 香蕉
西瓜 葡萄 草莓 桃子 柠檬 橙子 土豆 番茄 黄瓜 白菜 萝卜 南瓜 玉米 大豆 花生 鸡蛋
牛肉 羊肉 鱼汤 豆腐 米粉 包子 馒头 蛋糕 饼干 糖果 果汁 绿茶 红茶 花茶 开水 早餐
午餐 晚餐 点心 菜单 餐厅 酒店 旅馆 客房 前台 大厅 会议 办公 教室 宿舍 食堂 操场
球场 广场 市场 商场 商店 鞋店 花店 药店 茶叶 衣服 裤子 帽子 手套 围巾 雨伞 眼镜
手表 钱包 书包 铅笔 钢笔 本子 报纸 杂志 小说 诗歌 故事 历史 地理 数学 语文 英语
科学 美术 老师 学生 医生 护士 司机 厨师 警察 工人 农民 朋友 家人 孩子 爷爷 奶奶
爸爸 妈妈 哥哥 姐姐 弟弟 妹妹 左转 右转 直行 前进 慢行 禁止 注意 危险 高压 防火
节水 电话 电脑 电视 冰箱 空调 灯光 门票 售票 检票 候车 车站 码头 轮船 飞机 汽车
公交 单车 道路 大桥 隧道 东门 南门 西门 北门 中心 城市 乡村 社区 银杏 梅花 兰花
竹子 菊花 荷花 牡丹 松树 柳树 桂花 海滩 沙滩 岛屿 湖泊 温泉 瀑布 雪山 冰川 沙漠
春节 中秋 元宵 端午 国庆 新年 快乐 平安 健康 幸福 友谊 和平 开门 关门 营业 休息
打折 免费 新品 特价 洗手间 停车场 图书馆 博物馆 体育馆 电影院 火车站 地铁站
飞机场 游泳池 咖啡店 面包房 水果店 服务台 加油站 派出所 幼儿园 动物园 植物园
收银台 问讯处 会议室 办公室 实验室 休息室 自行车 出租车 救护车 消防车 冰淇淋
方便面 豆浆店 小心地滑 禁止吸烟 请勿停车 欢迎光临 安全出口 节约用水 保持安静
爱护花草 今日特价 正在营业 新年快乐
"""
_COLOURS = {
  "red": "红色",
  "green": "绿色",
  "blue": "蓝色",
  "black": "黑色",
  "white": "白色",
  "yellow": "黄色",
}
_SHAPES = {
  "circle": "圆形",
  "square": "正方形",
  "triangle": "三角形",
  "star": "星形",
}
_PLACES = {"above": "上方", "beside": "旁边"}
_LONGEST = 4  # characters of a line: a shape beside it has two columns


@functools.cache
def words(split: str) -> tuple[str, ...]:
  """Words that make a text of a split, none with one of another's in it."""
  if split == "train":
    return tuple(word for word in _WORDS.split() if not _held_out(word))
  wanted = {"validation", "test"} if split == "held-out" else {split}
  every = ((word, _held_out(word)) for word in _WORDS.split())
  return tuple(word for word, found in every if found and found <= wanted)


def _held_out(text):
  """Splits besides "train" of the words that stand somewhere in a text."""
  return {word_split(w) for w in _WORDS.split() if w in text} - {"train"}


def draw(pick: Picks, split: str) -> Sign:
  """What the sign of a record shows."""
  light, dark = pick(world_paint.LIGHT), pick(world_paint.DARK)
  colour, board = pick(((light, dark), (dark, light)))
  text = _draw_words(pick, split)
  shape = pick(("", *_SHAPES))
  return Sign(text, colour, board, shape, pick((*_PLACES,)) if shape else "")


def _draw_words(pick, split):
  kind = pick(range(10))
  if split == "train" and kind < 3:
    # Every character at every place, those of held-out words as well.
    first = _draw_row(pick, pick(range(2, _LONGEST + 1)))
  else:
    first = pick(words(split))
  if kind % 2:
    return (first,)
  if kind in (4, 6):
    return first, f"{pick(range(1, 100))}号"
  second = pick(words("train"))
  return (second, first) if kind == 8 else (first, second)


def _draw_row(pick, length):
  characters = _characters()
  while True:
    row = "".join(pick(characters) for _ in range(length))
    if not _held_out(row):
      return row


@functools.cache
def _characters():
  return "".join(sorted({*_WORDS} - {*" \n"}))


def _with_shape(sign):
  if not sign.shape:
    return ""
  return f"，{_PLACES[sign.place]}有一个{_SHAPES[sign.shape]}"


def caption(sign: Sign) -> str:
  """A caption with everything there is."""
  return (
    f"一块{_COLOURS[sign.board]}的牌子，用{_COLOURS[sign.colour]}写着"
    f"“{sign.text}”{_with_shape(sign)}。"
  )


def misspelt(sign: Sign, pick: Picks) -> Sign:
  """The sign itself: signs of this level are as they were asked for."""
  del pick
  return sign


def prompt(sign: Sign, pick: Picks) -> str:
  """One of the wordings that ask for the sign."""
  text, shape = f"“{sign.text}”", _with_shape(sign)
  colour, board = _COLOURS[sign.colour], _COLOURS[sign.board]
  return pick(
    (
      f"一块写着{text}的{board}牌子{shape}。",
      f"{board}的牌子上有{colour}的文字{text}{shape}。",
      f"画一块{board}的牌子，用{colour}写上{text}{shape}。",
      f"{text}，{colour}的字写在{board}的牌子上{shape}。",
      f"请做一块牌子，上面写着{text}，{board}的底，{colour}的字{shape}。",
    )
  )


def questions(sign: Sign) -> list[list[str]]:
  """[question, answer] pairs; those on single characters come last."""
  count = sum(map(len, sign.words))
  pairs = [
    ["牌子上写着什么？", sign.text],
    ["文字是什么颜色？", _COLOURS[sign.colour]],
    ["牌子是什么颜色？", _COLOURS[sign.board]],
    ["牌子上有什么形状？", _SHAPES.get(sign.shape, "没有")],
    ["牌子上有几个字？", str(count)],
  ]
  for row, word in enumerate(sign.words, 1):
    of = f"第{row}行" if len(sign.words) > 1 else ""
    pairs += [
      [f"{of}第{column}个字是什么？", character]
      for column, character in enumerate(word, 1)
    ]
  return pairs
