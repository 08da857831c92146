// Asks one question and prints the answer while it is generated.
// npm install && node chat.js "What do llamas eat?" [host:port]
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { fileURLToPath } from "node:url";

const [question = "What do llamas eat?", target = "127.0.0.1:50051"] = process.argv.slice(2);

const protos = fileURLToPath(new URL("../../protos", import.meta.url));
const definition = loader.loadSync("llama/v1/chat.proto", {
  includeDirs: [protos],
  enums: String, // FINISH_REASON_STOP, and not 1
  longs: String, // seeds have 64 bits, JavaScript's numbers 53
  oneofs: true, // event.kind names what happened
});
const { ChatService } = grpc.loadPackageDefinition(definition).llama.v1;

// Without this option gRPC would use an http_proxy of the environment even for this machine.
const direct = { "grpc.enable_http_proxy": 0 };
const client = new ChatService(target, grpc.credentials.createInsecure(), direct);
const stream = client.ChatCompleteStream({
  dialogs: [{ messages: [{ role: "ROLE_USER", content: question }] }],
  sampling: { temperature: 0 },
});
stream.on("data", ({ event }) => {
  if (event.kind === "delta") process.stdout.write(event.delta.text);
});
stream.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
stream.on("end", () => process.stdout.write("\n"));
