// Where a turn of speech begins and ends: by loudness against the noise of the room.

const BEGIN = 0.15; // seconds of sound that begin a turn: a click is shorter
const END = 0.9; // seconds of quiet that end it
const SMOOTH = 0.03; // seconds over which the level is a mean
const LONGEST = 30; // seconds
const ABOVE = 3; // times as loud as the room
const LEAST = 0.008; // a level (root mean square, full scale 1) below which nothing is speech
export const BEFORE = 0.5; // seconds before the turn began that belong to it

export class Turns {
  // onBegin() when somebody has begun to speak, onEnd() when the turn is over.
  constructor(onBegin, onEnd) {
    Object.assign(this, { onBegin, onEnd, noise: LEAST, loud: 0, quiet: 0, length: 0, level: 0, speaking: false });
  }

  // One block: its level and its length in seconds.
  hear(loudness, seconds) {
    this.level += (loudness - this.level) * Math.min(1, seconds / SMOOTH); // smoothed: a voice has gaps of milliseconds
    const level = this.level;
    // The noise of the room: the lowest level lately. It falls quickly and rises slowly (it doubles in about 7 s).
    this.noise = level < this.noise ? 0.9 * this.noise + 0.1 * level : this.noise * (1 + 0.1 * seconds);
    const sound = level > Math.max(LEAST, ABOVE * this.noise);
    this.loud = sound ? this.loud + seconds : Math.max(0, this.loud - seconds / 2);
    this.quiet = sound ? 0 : this.quiet + seconds;
    this.length += seconds;
    if (!this.speaking && this.loud > BEGIN) {
      this.speaking = true;
      this.length = 0;
      this.onBegin();
    } else if (this.speaking && (this.quiet > END || this.length > LONGEST)) {
      this.speaking = false;
      this.loud = 0;
      this.onEnd();
    }
  }
}
