// Hear alerts, and take them for somebody: node alerts.mjs [ADDRESS] [NAME]   (npm install zeromq)
import { createRequire } from "node:module";
const zmq = createRequire(import.meta.url)("zeromq");

const [address = "tcp://127.0.0.1:5571", by] = process.argv.slice(2);
const socket = new zmq.Dealer({ linger: 0 });
socket.connect(address);
const say = (message) => socket.send(JSON.stringify(message)).catch(() => {});
const hello = () => say({ op: "hello", client: "node example", after: 0 });
const timer = setInterval(hello, 3000); // said again and again, a restart of the daemon is then survived
hello();

const known = new Set(); // alerts come until somebody takes them: what is done is done once for each id
for await (const [frame] of socket) {
  const message = JSON.parse(frame.toString());
  if (message.op === "alert" && message.state === "open") {
    if (!known.has(message.alert_id)) console.log(`${message.finding} ${message.probability} ${message.alert_id}`);
    known.add(message.alert_id);
    if (by) say({ op: "ack", alert_id: message.alert_id, by });
  } else if (message.op === "acknowledged") {
    console.log(`${message.alert_id} taken by ${message.by}`);
    if (by && message.by === by) break;
  } else if (message.op === "refused") {
    console.error(message.reason);
  }
}
clearInterval(timer);
socket.close();
